#include "kernels/combine.hpp"

#include "kernels/launch.cuh"
#include "kernels/launch.hpp"

namespace deepep::kernels {

void launch_combine(const CombineArgs& args, int num_blocks, void* stream) {
  const CombineShared shared{args.group.num_ranks};
  launch<CombineArgs>(combine_kernel, args, num_blocks, kCombineThreads, shared.bytes(), stream, "combine");
}

}  // namespace deepep::kernels
