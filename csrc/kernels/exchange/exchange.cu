#include "kernels/exchange/exchange.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/exchange/exchange_read.hpp"
#include "kernels/exchange/launch.hpp"

namespace deepep::kernels {

void load_exchange() {
  load<ExchangeArgs>(exchange_kernel, "exchange");
  load<ExchangeArgs>(exchange_read_kernel, "exchange");
}

void launch_exchange(const ExchangeArgs& args, int num_blocks, void* stream) {
  const Kernel<ExchangeArgs> kernel = args.sums == nullptr ? exchange_kernel : exchange_read_kernel;
  launch(kernel, args, num_blocks, kThreads, sizeof(uint32_t), stream, "exchange");
}

}  // namespace deepep::kernels
