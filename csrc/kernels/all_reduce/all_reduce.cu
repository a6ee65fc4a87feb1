#include "kernels/all_reduce/direct.hpp"
#include "kernels/all_reduce/launch.hpp"
#include "kernels/all_reduce/oneshot.hpp"
#include "kernels/common/launch.cuh"

namespace deepep::kernels {

void load_all_reduce() {
  load<AllReduceArgs>(all_reduce_oneshot_kernel, "all-reduce");
  load<AllReduceArgs>(all_reduce_direct_kernel, "all-reduce");
}

void launch_all_reduce(const AllReduceArgs& args, bool is_oneshot, int num_blocks, void* stream) {
  const Kernel<AllReduceArgs> kernel = is_oneshot ? all_reduce_oneshot_kernel : all_reduce_direct_kernel;
  launch(kernel, args, num_blocks, kReduceThreads, kReduceSharedWords * sizeof(uint32_t), stream, "all-reduce");
}

}  // namespace deepep::kernels
