// Where things lie in the symmetric memory of the bare exchange: flags, one for each block of each source, then
// the rows of each source, twice, by the parity of the epoch.
#pragma once

#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// The most blocks that an exchange may have.
inline constexpr int kMaxExchangeBlocks = 256;

/// One rank's memory: what `source` writes there. Made by the host.
struct ExchangeSlots {
  ExchangeSlots() = default;
  /// pair_bytes: the most that a rank pushes to another.
  DEEPEP_HD ExchangeSlots(int ranks, int64_t pair_bytes)
      : pair_bytes_(align_up(pair_bytes, kLine)), num_ranks_(ranks) {}

  /// The epoch up to which `source`'s block has pushed its part: a 4-byte word. A block's flags are those that
  /// one warp reads together.
  [[nodiscard]] DEEPEP_HD int64_t flag(int source, int block) const {
    return block * block_bytes() + 4 * source;
  }
  /// What is zero before the first call; the rest is read behind flags alone.
  [[nodiscard]] DEEPEP_HD int64_t control_bytes() const { return kMaxExchangeBlocks * block_bytes(); }
  /// Rows of `source` in the call with this epoch.
  [[nodiscard]] DEEPEP_HD int64_t rows(uint32_t epoch, int source) const {
    return control_bytes() + (static_cast<int64_t>(epoch & 1u) * num_ranks_ + source) * pair_bytes_;
  }
  /// A rank's rows for another, in its own memory: `rank` times this from the first.
  [[nodiscard]] DEEPEP_HD int64_t pair_bytes() const { return pair_bytes_; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return control_bytes() + 2 * num_ranks_ * pair_bytes_; }

 private:
  [[nodiscard]] DEEPEP_HD int64_t block_bytes() const { return align_up(int64_t{4} * num_ranks_, kLine); }

  int64_t pair_bytes_;
  int num_ranks_;
};

}  // namespace deepep::layout
