// Plain contiguous copies by a given number of SMs: the floor that dispatch and combine are measured against. One
// through registers, one through bulk copies, which need no registers for what is in flight.
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

struct CopyArgs {
  const std::byte* from;
  std::byte* to;
  int64_t bytes;  // a multiple of 16
};

DEEPEP_KERNEL(copy_kernel, CopyArgs, kThreads) {
  using namespace dev;
  constexpr int kUnroll = 8;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.from);
  Vec16* to = reinterpret_cast<Vec16*>(args.to);
  const int64_t count = args.bytes / 16;
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_threads();
  const int64_t own = static_cast<int64_t>(block()) * num_threads() + thread();
  for (int64_t first = own; first < count; first += step * kUnroll) {
    Vec16 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * step < count) v[u] = load_once(from + first + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * step < count) store_streaming(to + first + u * step, v[u]);
  }
}

/// Stages of a ring that are stored and whose reading nobody has waited for. A stage is loaded again when it is no
/// longer one of them, so a ring has more.
inline constexpr int kUnreadStages = 2;
inline constexpr int kMinStages = kUnreadStages + 1;

/// The block's shared memory: each warp's mbarriers, one a stage, then each warp's stages.
struct BulkCopyShared {
  int num_warps;
  int num_stages;  // per warp
  int64_t stage_bytes;

  [[nodiscard]] DEEPEP_HD int64_t stages_begin() const {
    return layout::align_up(int64_t{8} * num_warps * num_stages, int64_t{128});
  }
  [[nodiscard]] DEEPEP_HD int64_t stage(int warp, int i) const {
    return stages_begin() + (static_cast<int64_t>(warp) * num_stages + i) * stage_bytes;
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return stage(num_warps, 0); }
};

struct BulkCopyArgs {
  const std::byte* from;
  std::byte* to;
  int64_t bytes;        // a multiple of 16
  int64_t stage_bytes;  // a multiple of 16
  int num_stages;       // per warp, at least kMinStages
  uint64_t timeout_ns;  // for a load
};

/// One lane of each warp drives a ring of stages: chunks of a stage's size come in and go out, and nothing but the
/// copies ever touches a stage, so no proxy fence is needed between them. `launch_bulk_copy` checks the arguments.
DEEPEP_KERNEL(bulk_copy_kernel, BulkCopyArgs, kThreads) {
  using namespace dev;
  if (lane() != 0) return;
  const int num_stages = args.num_stages;
  const BulkCopyShared layout{num_warps(), num_stages, args.stage_bytes};
  const SharedArray<uint64_t> filled(int64_t{8} * warp() * num_stages);
  const auto stage_at = [&](int stage) { return SharedArray<Vec16>(layout.stage(warp(), stage)).at(0); };

  // This warp's chunks: every `step`-th of all.
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_warps();
  const int64_t first = static_cast<int64_t>(block()) * num_warps() + warp();
  const int64_t chunks = layout::ceil_div(args.bytes, args.stage_bytes);
  const int64_t count = first < chunks ? layout::ceil_div(chunks - first, step) : 0;
  const auto begin_of = [&](int64_t i) { return (first + i * step) * args.stage_bytes; };
  const auto bytes_of = [&](int64_t i) {
    const int64_t left = args.bytes - begin_of(i);
    return left < args.stage_bytes ? left : args.stage_bytes;
  };
  const auto fill = [&](int stage, int64_t i) {
    mbarrier_expect<release, block_scope>(filled.at(stage), static_cast<uint32_t>(bytes_of(i)));
    bulk_load(stage_at(stage), args.from + begin_of(i), bytes_of(i), filled.at(stage));
  };

  for (int stage = 0; stage < num_stages; ++stage) mbarrier_init(filled.at(stage), 1);
  fence_async<shared_space>();  // before the first copy completes on them
  for (int stage = 0; stage < num_stages && stage < count; ++stage) fill(stage, stage);

  const Deadline deadline = Deadline::in(args.timeout_ns);
  int stage = 0;         // of chunk i
  uint32_t round = 0;    // how often the ring has gone round before it
  int read_stage = 0;    // of chunk i - kUnreadStages
  for (int64_t i = 0; i < count; ++i) {
    // What does not come in time comes from a peer that is gone: its memory is not this kernel's to report.
    if (!mbarrier_wait<acquire, block_scope>(filled.at(stage), round, deadline)) break;
    bulk_store(args.to + begin_of(i), stage_at(stage), bytes_of(i));
    bulk_commit();
    if (++stage == num_stages) {
      stage = 0;
      ++round;
    }
    if (i < kUnreadStages) continue;
    bulk_wait_read<kUnreadStages>();  // so chunk i - kUnreadStages has left its stage
    const int64_t next = i - kUnreadStages + num_stages;
    if (next < count) fill(read_stage, next);
    if (++read_stage == num_stages) read_stage = 0;
  }
  bulk_wait<0>();  // complete, not only on its way, when the kernel ends
}

}  // namespace deepep::kernels
