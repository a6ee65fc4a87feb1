// The rows of a warp's first message on their way into shared memory while it waits for their weights: bulk
// copies, which hold no registers. Where a message has more rows than there is room for, where the GPU has none
// of them, and for messages that come later, rows are read as they are summed.
#pragma once

#include "kernels/low_latency/combine_call.hpp"
#include "kernels/low_latency/sum_rows.hpp"

namespace deepep::kernels {

inline constexpr int kStageUnroll = 4;  // 16-byte pieces of a row that a lane sums at once

/// Some 16-byte pieces of a row.
struct Pieces {
  int begin;
  int end;
};

/// Of this warp.
[[nodiscard]] DEEPEP_DEVICE uint64_t* stage_barrier(const LowLatencyCombineCall& call) {
  return dev::SharedArray<uint64_t>(call.shared().barriers()).at(dev::warp());
}

/// Row i of this warp's.
[[nodiscard]] DEEPEP_DEVICE dev::SharedArray<dev::Vec16> stage_of(const LowLatencyCombineCall& call, int i) {
  return dev::SharedArray<dev::Vec16>(call.shared().stage(dev::warp(), i));
}

/// Asks for the pieces of the rows whose addresses lanes hold. One warp, once in a launch. False if there is no
/// room for them.
[[nodiscard]] DEEPEP_DEVICE bool stage_rows(const LowLatencyCombineCall& call, uint32_t rows, uint64_t address,
                                            const Pieces& mine) {
  using namespace dev;
  const int count = popcount(rows), bytes = 16 * (mine.end - mine.begin);
  if (!kHasBulkCopies || count == 0 || bytes == 0 || count > call.args.share.staged_rows) return false;
  uint64_t* barrier = stage_barrier(call);
  if (lane() == 0) {
    mbarrier_init(barrier, 1);
    fence_async<shared_space>();
    mbarrier_expect<release, block_scope>(barrier, static_cast<uint32_t>(count * bytes));
  }
  sync_warp();
  if ((rows >> lane()) & 1u) {
    const int i = popcount(rows & ((1u << lane()) - 1u));
    bulk_load(stage_of(call, i).at(0), reinterpret_cast<const std::byte*>(address) + 16 * mine.begin, bytes,
              barrier);
  }
  return true;
}

/// Waits for what `stage_rows` has asked for: always, since a block must not end before it is there. One warp.
/// As long as it takes: it is a read of this GPU's own memory, and waits for nobody.
DEEPEP_DEVICE void wait_stage(const LowLatencyCombineCall& call) {
  using namespace dev;
#pragma unroll 1
  while (!mbarrier_wait<acquire, block_scope>(stage_barrier(call), 0, Deadline::in(call.g.timeout_ns)));
}

/// The sum of the rows in this warp's stage, weighted, in the order of their lanes, to pieces [begin, end) of
/// `out`.
DEEPEP_DEVICE void sum_stage(const LowLatencyCombineCall& call, dev::Vec16* out, const SumRows& given,
                             const Pieces& mine) {
  using namespace dev;
  const int pieces = mine.end - mine.begin;
#pragma unroll 1
  for (int begin = lane(); begin < pieces + lane(); begin += kStageUnroll * kWarpSize) {
    const int left = pieces - begin;
    float sum[kStageUnroll][8];
#pragma unroll
    for (int u = 0; u < kStageUnroll; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[u][i] = -0.0f;
    int row = 0;
#pragma unroll 1
    for (uint32_t rows = given.rows; rows != 0; rows &= rows - 1) {
      const float weight = shuffle(given.weight, lowest_bit(rows));
      const SharedArray<Vec16> stage = stage_of(call, row++);
#pragma unroll
      for (int u = 0; u < kStageUnroll; ++u)
        if (u * kWarpSize < left) add_channels<true>(sum[u], stage.get(begin + u * kWarpSize), weight);
    }
#pragma unroll
    for (int u = 0; u < kStageUnroll; ++u)
      if (u * kWarpSize < left)
        store_streaming(out + mine.begin + begin + u * kWarpSize, round_channels(sum[u]));
  }
}

}  // namespace deepep::kernels
