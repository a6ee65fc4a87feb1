#include "kernels/combine/combine.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"

namespace deepep::kernels {

void launch_combine(const CombineArgs& args, int num_blocks, void* stream) {
  const CombineShared shared{args.group.num_ranks};
  const auto kernel = args.copy_engine.chunks.num_chunks > 0 ? combine_carried_kernel : combine_kernel;
  launch<CombineArgs>(kernel, args, num_blocks, kCombineThreads, shared.bytes(), stream, "combine");
}

}  // namespace deepep::kernels
