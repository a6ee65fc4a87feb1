// Two-level routing: a token crosses to a domain at most once, to the rank there with its source's local index,
// which spreads it to the domain's ranks. Their rows are those of flat routing: nothing downstream can tell.
// For the CPU alone: the host makes the kernels' tables of them (host/rails.hpp).
#pragma once

#include "layout/counts.hpp"
#include "layout/rows.hpp"

namespace deepep::layout {

/// The rank of `domain` that takes in what `source` sends there: the one with the same local index (in a last,
/// smaller domain: that index modulo the domain's size). On its own domain that is the source itself.
[[nodiscard]] DEEPEP_HD constexpr int32_t forwarding_rank(int32_t source, int32_t domain,
                                                          const Placement& place) {
  const int32_t local = source - place.first_rank_of_domain(place.domain_of_rank(source));
  return place.first_rank_of_domain(domain) + local % place.num_ranks_of_domain(domain);
}

/// The same among the ranks that `alive(rank)`: from a masked one on, the next of the domain, cyclically; -1
/// where all of them are masked.
template <class Alive>
[[nodiscard]] DEEPEP_HD constexpr int32_t living_gateway(int32_t source, int32_t domain, const Placement& place,
                                                         const Alive& alive) {
  const int32_t first = place.first_rank_of_domain(domain), size = place.num_ranks_of_domain(domain);
  const int32_t start = forwarding_rank(source, domain, place) - first;
  for (int32_t step = 0; step < size; ++step) {
    const int32_t rank = first + (start + step) % size;
    if (alive(rank)) return rank;
  }
  return -1;
}

/// The domain's ranks a token goes to, as bits by local rank (ranks_per_domain <= 64): travels with the token.
/// `in_rank` is the token's row of is_token_in_rank. Zero: the token does not go to the domain.
[[nodiscard]] DEEPEP_HD constexpr uint64_t local_ranks_of_token(const uint8_t* in_rank, int32_t domain,
                                                                const Placement& place) {
  uint64_t mask = 0;
  for (int32_t local = 0; local < place.num_ranks_of_domain(domain); ++local) {
    mask |= uint64_t(in_rank[place.first_rank_of_domain(domain) + local] != 0) << local;
  }
  return mask;
}

/// Tokens of [begin, end) that go to `domain`.
[[nodiscard]] DEEPEP_HD constexpr int32_t count_sent_to_domain(const uint8_t* is_token_in_rank, int32_t domain,
                                                               int64_t begin, int64_t end,
                                                               const Placement& place) {
  int32_t count = 0;
  for (int64_t token = begin; token < end; ++token) {
    count += local_ranks_of_token(is_token_in_rank + token * place.num_ranks, domain, place) != 0;
  }
  return count;
}

/// What a source sends to each domain, for tokens [begin, end): masks [T, D]
/// and position [T, D], the token's place among those that go to the domain,
/// or -1. next [D] comes in as the counts of the ranges before this one.
DEEPEP_HD constexpr void fill_domain_positions(const uint8_t* is_token_in_rank, int64_t begin, int64_t end,
                                               const Placement& place, int64_t* next, uint64_t* masks,
                                               int32_t* position) {
  for (int64_t token = begin; token < end; ++token) {
    for (int32_t domain = 0; domain < place.num_domains(); ++domain) {
      const int64_t at = token * place.num_domains() + domain;
      masks[at] = local_ranks_of_token(is_token_in_rank + token * place.num_ranks, domain, place);
      position[at] = int32_t(take_next(masks[at] != 0, next[domain]));
    }
  }
}

/// At the forwarding rank: final rows of the tokens one source sent, in the order they were sent. masks [n];
/// next [domain_ranks] comes in as the source's first row at each rank of the domain; rows [n, domain_ranks],
/// or -1. A token that skips the domain goes to none of its ranks, so counting the forwarded tokens counts
/// them all.
DEEPEP_HD constexpr void fill_forwarded_rows(const uint64_t* masks, int64_t num_forwarded, int32_t domain_ranks,
                                             int64_t* next, int64_t* rows) {
  for (int64_t i = 0; i < num_forwarded; ++i) {
    for (int32_t local = 0; local < domain_ranks; ++local) {
      rows[i * domain_ranks + local] = take_next((masks[i] >> local & 1) != 0, next[local]);
    }
  }
}

}  // namespace deepep::layout
