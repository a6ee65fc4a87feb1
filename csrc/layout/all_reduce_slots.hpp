// Where things lie in the symmetric memory of an all-reduce: flags, one for each block of each source and of
// each of its two rounds; then what a source pushes, addends and results, each twice, by the parity of the
// epoch.
#pragma once

#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// The most blocks that an all-reduce may have.
inline constexpr int kMaxReduceBlocks = 256;

/// Rounds of a call: addends to who sums them, results to everybody.
enum class ReduceRound : int32_t { kAddends = 0, kResults = 1 };

/// One rank's memory: what `source` writes there. Made by the host.
struct AllReduceSlots {
  AllReduceSlots() = default;
  /// pair_bytes: the most that a rank pushes to another in a round.
  DEEPEP_HD AllReduceSlots(int ranks, int64_t pair_bytes)
      : pair_bytes_(align_up(pair_bytes, kLine)), num_ranks_(ranks) {}

  /// The epoch up to which `source`'s block has pushed its part of a round: a 4-byte word. A block's flags of
  /// a round are those that one warp reads together.
  [[nodiscard]] DEEPEP_HD int64_t flag(ReduceRound round, int source, int block) const {
    return (static_cast<int64_t>(round) * kMaxReduceBlocks + block) * block_bytes() + 4 * source;
  }
  /// What is zero before the first call; the rest is read behind flags alone.
  [[nodiscard]] DEEPEP_HD int64_t control_bytes() const { return 2 * kMaxReduceBlocks * block_bytes(); }
  /// Messages of `source` in a round of the call with this epoch.
  [[nodiscard]] DEEPEP_HD int64_t messages(ReduceRound round, uint32_t epoch, int source) const {
    const int64_t place = 2 * static_cast<int64_t>(round) + static_cast<int64_t>(epoch & 1u);
    return control_bytes() + (place * num_ranks_ + source) * pair_bytes_;
  }
  [[nodiscard]] DEEPEP_HD int64_t pair_bytes() const { return pair_bytes_; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return control_bytes() + 4 * num_ranks_ * pair_bytes_; }

 private:
  [[nodiscard]] DEEPEP_HD int64_t block_bytes() const { return align_up(int64_t{4} * num_ranks_, kLine); }

  int64_t pair_bytes_;
  int num_ranks_;
};

}  // namespace deepep::layout
