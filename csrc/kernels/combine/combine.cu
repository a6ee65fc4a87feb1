#include "kernels/combine/combine.hpp"

#include "kernels/combine/copy_engine.hpp"
#include "kernels/combine/expanded.hpp"
#include "kernels/combine/refused.hpp"
#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"

namespace deepep::kernels {

namespace {

Kernel<CombineArgs> kernel_of(CombineMode mode, bool expanded) {
  switch (mode) {
    case CombineMode::kCopyEngine: return combine_copy_engine_kernel;
    case CombineMode::kRefused: return combine_refused_kernel;
    default: return expanded ? combine_expanded_kernel : combine_kernel;
  }
}

/// The form of a call that `records`.
Kernel<Recorded<CombineArgs>> recorded_kernel_of(CombineMode mode) {
  return mode == CombineMode::kCopyEngine ? combine_copy_engine_kernel_recorded : combine_kernel_recorded;
}

}  // namespace

void launch_combine(const CombineArgs& args, int num_blocks, void* stream, const Lines& lines) {
  static_assert(kCombineThreads == kThroughputWarps * dev::kWarpSize);
  const CombineShared shared{args.group.num_ranks};
  if (lines.words != nullptr)
    return launch(recorded_kernel_of(args.mode), Recorded<CombineArgs>{args, lines}, num_blocks,
                  kCombineThreads, shared.bytes(), stream, "combine");
  const Kernel<CombineArgs> kernel = kernel_of(args.mode, args.slots != nullptr);
  launch(kernel, args, num_blocks, kCombineThreads, shared.bytes(), stream, "combine");
}

void load_combine() {
  for (const CombineMode mode : {CombineMode::kSplit, CombineMode::kCopyEngine, CombineMode::kRefused})
    load(kernel_of(mode, false), "combine");
  load(kernel_of(CombineMode::kSplit, true), "combine");
  for (const CombineMode mode : {CombineMode::kSplit, CombineMode::kCopyEngine})
    load(recorded_kernel_of(mode), "combine");
}

}  // namespace deepep::kernels
