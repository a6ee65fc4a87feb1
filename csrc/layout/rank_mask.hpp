// Ranks of a group of several domains, as bits: they are more than a warp has lanes.
#pragma once

#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// Ranks of a group; those of each of its domains are at most kMaxRanks.
inline constexpr int kMaxGroupRanks = 256;
/// Domains of a group: a warp's lanes hold a token's addends, which are their sums and two biases.
inline constexpr int kMaxDomains = kMaxRanks - 2;
inline constexpr int kMaskWords = kMaxGroupRanks / 32;

/// Bit r % 32 of word r / 32: rank r is one of them.
struct RankMask {
  uint32_t words[kMaskWords];

  [[nodiscard]] DEEPEP_HD constexpr bool has(int rank) const {
    return ((words[rank / 32] >> (rank % 32)) & 1u) != 0;
  }
  DEEPEP_HD constexpr void add(int rank) { words[rank / 32] |= 1u << (rank % 32); }
};

}  // namespace deepep::layout
