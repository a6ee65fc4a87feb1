#include "kernels/dispatch/dispatch.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"

namespace deepep::kernels {

void launch_dispatch(const DispatchArgs& given, int num_blocks, void* stream) {
  DispatchArgs args = given;
  prepare(args);
  const DispatchShared shared{args.group.num_ranks, kDispatchThreads / dev::kWarpSize};
  const auto kernel = args.cached ? dispatch_cached_kernel : dispatch_kernel;
  launch<DispatchArgs>(kernel, args, num_blocks, kDispatchThreads, shared.bytes(), stream, "dispatch");
}

}  // namespace deepep::kernels
