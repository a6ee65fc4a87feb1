// Who is whose gateway in low-latency calls in two levels, and what a rank relays.
#pragma once

#include "kernels/low_latency_far/puts.hpp"
#include "kernels/low_latency_rails/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE int domain_of(const RailDomain& own, int rank) {
  return own.by_ranks.quotient(rank);
}
[[nodiscard]] DEEPEP_DEVICE int local_index(const RailDomain& own, int rank) {
  return rank - domain_of(own, rank) * own.num_ranks;
}
[[nodiscard]] DEEPEP_DEVICE bool is_neighbour(const RailDomain& own, int rank) {
  return rank >= own.first && rank < own.first + own.num_ranks;
}

/// Where this rank puts what goes to `rank`: itself in this domain, its gateway in another.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE int next_hop(const Call& call, int rank) {
  const RailDomain& own = call.domain;
  if (rank < 0 || is_neighbour(own, rank)) return rank;
  return domain_of(own, rank) * own.num_ranks + local_index(own, call.g.rank);
}

/// Ranks of this domain, as bits.
[[nodiscard]] DEEPEP_DEVICE uint32_t neighbours_of(const RailDomain& own) {
  return (0xffffffffu >> (32 - own.num_ranks)) << own.first;
}

/// Items that all warps of a launch share in turn.
struct WarpTurns {
  int left;  // items before this warp's next one

  [[nodiscard]] DEEPEP_DEVICE static WarpTurns begin() {
    return {dev::block() * dev::num_warps() + dev::warp()};
  }
  /// True of an item that is this warp's.
  [[nodiscard]] DEEPEP_DEVICE bool is_mine() {
    if (left-- > 0) return false;
    left += dev::num_blocks() * dev::num_warps();
    return true;
  }
};

}  // namespace deepep::kernels
