#include "kernels/two_level/combine.hpp"
#include "kernels/two_level/dispatch.hpp"
#include "kernels/two_level/dispatch_cached.hpp"
#include "kernels/two_level/prefix.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/two_level/launch.hpp"

namespace deepep::kernels {

void launch_two_level(const TwoLevelPrefixArgs& args, void* stream) {
  launch(two_level_prefix_kernel, args, 1, kThreads, 16, stream, "dispatch");
}

void launch_two_level(const TwoLevelDispatchArgs& given, int num_blocks, void* stream) {
  TwoLevelDispatchArgs args = given;
  prepare(args, num_blocks, kTwoLevelDispatchThreads / dev::kWarpSize);
  const bool is_cached = args.dispatch.mode == DispatchMode::kCached;
  launch(is_cached ? two_level_dispatch_cached_kernel : two_level_dispatch_kernel, args, num_blocks,
         kTwoLevelDispatchThreads, shared_bytes(args), stream, "dispatch");
}

void launch_two_level(const TwoLevelCombineArgs& args, int num_blocks, void* stream) {
  launch(two_level_combine_kernel, args, num_blocks, kCombineThreads,
         shared_of(args).bytes(), stream, "combine");
}

void load_two_level() {
  load(two_level_prefix_kernel, "dispatch");
  load(two_level_dispatch_kernel, "dispatch");
  load(two_level_dispatch_cached_kernel, "dispatch");
  load(two_level_combine_kernel, "combine");
}

}  // namespace deepep::kernels
