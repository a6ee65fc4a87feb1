#include "kernels/dispatch/dispatch.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"
#include "kernels/dispatch/cached.hpp"
#include "kernels/dispatch/refused.hpp"

namespace deepep::kernels {

namespace {

Kernel<DispatchArgs> kernel_of(DispatchMode mode) {
  switch (mode) {
    case DispatchMode::kCached: return dispatch_cached_kernel;
    case DispatchMode::kRefused: return dispatch_refused_kernel;
    default: return dispatch_kernel;
  }
}

}  // namespace

void launch_dispatch(const DispatchArgs& given, int num_blocks, void* stream) {
  DispatchArgs args = given;
  prepare(args);
  const DispatchShared shared{args.group.num_ranks, kDispatchThreads / dev::kWarpSize};
  launch(kernel_of(args.mode), args, num_blocks, kDispatchThreads, shared.bytes(), stream, "dispatch");
}

void load_dispatch() {
  for (const DispatchMode mode : {DispatchMode::kFresh, DispatchMode::kCached, DispatchMode::kRefused})
    load(kernel_of(mode), "dispatch");
}

}  // namespace deepep::kernels
