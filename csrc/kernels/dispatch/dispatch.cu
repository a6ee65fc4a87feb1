#include "kernels/dispatch/dispatch.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"
#include "kernels/dispatch/cached.hpp"
#include "kernels/dispatch/expanded.hpp"
#include "kernels/dispatch/refused.hpp"
#include "kernels/dispatch/topk.hpp"

namespace deepep::kernels {

namespace {

Kernel<DispatchArgs> kernel_of(DispatchMode mode) {
  switch (mode) {
    case DispatchMode::kCached: return dispatch_cached_kernel;
    case DispatchMode::kRefused: return dispatch_refused_kernel;
    case DispatchMode::kTopk: return dispatch_topk_kernel;
    case DispatchMode::kExpanded: return dispatch_expanded_kernel;
    default: return dispatch_kernel;
  }
}

/// The form of a mode that `records`.
Kernel<Recorded<DispatchArgs>> recorded_kernel_of(DispatchMode mode) {
  switch (mode) {
    case DispatchMode::kCached: return dispatch_cached_kernel_recorded;
    case DispatchMode::kTopk: return dispatch_topk_kernel_recorded;
    default: return dispatch_kernel_recorded;
  }
}

}  // namespace

void launch_dispatch(const DispatchArgs& given, int num_blocks, void* stream, const Lines& lines) {
  DispatchArgs args = given;
  static_assert(kDispatchThreads == kThroughputWarps * dev::kWarpSize);
  const int threads = args.mode == DispatchMode::kExpanded ? kExpandedThreads : kDispatchThreads;
  const int warps = threads / dev::kWarpSize;
  prepare(args, num_blocks, warps);
  const int64_t shared = shared_bytes(args, warps);
  if (lines.words == nullptr)
    return launch_allowed(kernel_of(args.mode), args, num_blocks, threads, shared, stream, "dispatch");
  launch_allowed(recorded_kernel_of(args.mode), Recorded<DispatchArgs>{args, lines}, num_blocks, threads,
                 shared, stream, "dispatch");
}

void load_dispatch() {
  load_for_shared(dispatch_kernel, "dispatch");
  load_for_shared(dispatch_topk_kernel, "dispatch");
  load_for_shared(dispatch_expanded_kernel, "dispatch");
  load_for_shared(dispatch_cached_kernel, "dispatch");
  load_for_shared(dispatch_refused_kernel, "dispatch");
  for (const DispatchMode mode : {DispatchMode::kFresh, DispatchMode::kTopk, DispatchMode::kCached})
    load_for_shared(recorded_kernel_of(mode), "dispatch");
}

}  // namespace deepep::kernels
