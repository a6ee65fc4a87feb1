// A plain contiguous copy through bulk copies, which need no registers for what is in flight. One lane of each
// warp drives a ring of stages: chunks of a stage's size come in and go out, and nothing but the copies ever
// touches a stage, so no proxy fence is needed between them. `launch_bulk_copy` checks the arguments.
//
// Phases:
//   start_ring   the ring's mbarriers, and loads into all its stages
//   turn_ring    chunk after chunk is stored, and its stage loaded again when that has been read
//   finish_ring  all stores are complete when the kernel ends
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

/// Stages of a ring that are stored and whose reading nobody has waited for. A stage is loaded again when it is
/// no longer one of them, so a ring has more.
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

/// A warp's ring of stages, and its chunks: every `step`-th of all.
struct BulkRing {
  const BulkCopyArgs& args;
  BulkCopyShared shared;
  dev::SharedArray<uint64_t> filled;  // an mbarrier a stage
  int64_t first;
  int64_t step;
  int64_t count;

  [[nodiscard]] DEEPEP_DEVICE dev::Vec16* stage_at(int stage) const {
    return dev::SharedArray<dev::Vec16>(shared.stage(dev::warp(), stage)).at(0);
  }
  [[nodiscard]] DEEPEP_DEVICE int64_t begin_of(int64_t i) const {
    return (first + i * step) * args.stage_bytes;
  }
  [[nodiscard]] DEEPEP_DEVICE int64_t bytes_of(int64_t i) const {
    const int64_t left = args.bytes - begin_of(i);
    return left < args.stage_bytes ? left : args.stage_bytes;
  }
  DEEPEP_DEVICE void fill(int stage, int64_t i) const {
    using namespace dev;
    mbarrier_expect<release, block_scope>(filled.at(stage), static_cast<uint32_t>(bytes_of(i)));
    bulk_load(stage_at(stage), args.from + begin_of(i), bytes_of(i), filled.at(stage));
  }
};

[[nodiscard]] DEEPEP_DEVICE BulkRing start_ring(const BulkCopyArgs& args) {
  using namespace dev;
  const int num_stages = args.num_stages;
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_warps();
  const int64_t first = static_cast<int64_t>(block()) * num_warps() + warp();
  const int64_t chunks = layout::ceil_div(args.bytes, args.stage_bytes);
  const BulkRing ring{.args = args,
                      .shared = {num_warps(), num_stages, args.stage_bytes},
                      .filled = SharedArray<uint64_t>(int64_t{8} * warp() * num_stages),
                      .first = first,
                      .step = step,
                      .count = first < chunks ? layout::ceil_div(chunks - first, step) : 0};
  for (int stage = 0; stage < num_stages; ++stage) mbarrier_init(ring.filled.at(stage), 1);
  fence_async<shared_space>();  // before the first copy completes on them
  for (int stage = 0; stage < num_stages && stage < ring.count; ++stage) ring.fill(stage, stage);
  return ring;
}

DEEPEP_DEVICE void turn_ring(const BulkRing& ring) {
  using namespace dev;
  const BulkCopyArgs& args = ring.args;
  const int num_stages = args.num_stages;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  int stage = 0;       // of chunk i
  uint32_t round = 0;  // how often the ring has gone round before it
  int read_stage = 0;  // of chunk i - kUnreadStages
  for (int64_t i = 0; i < ring.count; ++i) {
    // What does not come in time comes from a peer that is gone: its memory is not this kernel's to report.
    if (!mbarrier_wait<acquire, block_scope>(ring.filled.at(stage), round, deadline)) break;
    bulk_store(args.to + ring.begin_of(i), ring.stage_at(stage), ring.bytes_of(i));
    bulk_commit();
    if (++stage == num_stages) {
      stage = 0;
      ++round;
    }
    if (i < kUnreadStages) continue;
    bulk_wait_read<kUnreadStages>();  // so chunk i - kUnreadStages has left its stage
    const int64_t next = i - kUnreadStages + num_stages;
    if (next < ring.count) ring.fill(read_stage, next);
    if (++read_stage == num_stages) read_stage = 0;
  }
}

/// Complete, not only on its way.
DEEPEP_DEVICE void finish_ring() {
  using namespace dev;
  bulk_wait<0>();
}

DEEPEP_KERNEL(bulk_copy_kernel, BulkCopyArgs, kThreads) {
  if (!dev::kHasBulkCopies || dev::lane() != 0) return;  // the launch is refused there
  const BulkRing ring = start_ring(args);
  turn_ring(ring);
  finish_ring();
}

}  // namespace deepep::kernels
