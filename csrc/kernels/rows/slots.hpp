// The pairs of one received row, as a list in shared memory that the whole block reads.
#pragma once

#include "kernels/common/entry_sum.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::kernels {

/// In the order of k. slot [count], entry [count]: k; weight [count]: rounded to bf16, as rows are multiplied.
struct SlotList {
  static constexpr int64_t kCountAt = 12 * kMaxRowEntries, kEndAt = kCountAt + 16;
  dev::SharedArray<int64_t> slot{0};
  dev::SharedArray<float> weight{8 * kMaxRowEntries};
  dev::SharedArray<int32_t> count{kCountAt};
};

/// Lists row `row`'s pairs: the first warp; the block may read them behind its barrier. `weights`: [N, K] or
/// null.
DEEPEP_DEVICE void list_slots(const RowSpan& rows, const float* weights, int64_t row, SlotList& list) {
  using namespace dev;
  if (warp() != 0) return;
  const int64_t at = row * rows.num_topk + lane();
  const bool has = lane() < rows.num_topk;
  const int64_t slot = has ? load_once(rows.slots + at) : -1;
  const uint32_t present = ballot(slot >= 0);
  const int place = popcount(present & ((1u << lane()) - 1u));
  if (slot >= 0) {
    list.slot.set(place, slot);
    list.weight.set(place, weights != nullptr ? round_to_bf16(load_once(weights + at)) : 1.0f);
  }
  if (lane() == 0) list.count.set(0, popcount(present));
}

}  // namespace deepep::kernels
