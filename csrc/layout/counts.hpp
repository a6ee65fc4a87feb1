// What a rank sends: counts per rank, domain and expert, token-in-rank, and each token's row at its
// receivers. All of it works on a token range, so that blocks, warps or threads may each own one: count a
// range, prefix the counts over the ranges, then number the tokens inside each range from its start.
#pragma once

#include "layout/placement.hpp"
#include "layout/prefix.hpp"

namespace deepep::layout {

/// Where `count_topk` adds. `per_domain` and `is_token_in_rank` may be null.
struct TopkCounts {
  int32_t* per_rank;          // [R] tokens, each once per rank
  int32_t* per_domain;        // [D] tokens, each once per domain
  int32_t* per_expert;        // [E] top-k entries, duplicates included
  uint8_t* is_token_in_rank;  // [T, R] bytes 0 or 1; the rows of the range are overwritten
};

/// Adds the tokens [begin, end) of topk_idx [T, K] to `counts`. Serial: one owner per `counts`.
template <class Index>
DEEPEP_HD void count_topk(const Index* topk_idx, int num_topk, int64_t begin, int64_t end,
                          const Placement& place, const TopkCounts& counts) {
  for (int64_t token = begin; token < end; ++token) {
    const Index* row = topk_idx + token * num_topk;
    uint8_t* in_rank = counts.is_token_in_rank ? counts.is_token_in_rank + token * place.num_ranks : nullptr;
    for (int32_t rank = 0; in_rank && rank < place.num_ranks; ++rank) in_rank[rank] = 0;
    for (int k = 0; k < num_topk; ++k) {
      if (!place.is_expert(row[k])) continue;
      const int32_t expert = int32_t(row[k]);
      ++counts.per_expert[expert];
      if (!is_first_of_rank(row, k, place)) continue;
      const int32_t rank = place.rank_of_expert(expert);
      ++counts.per_rank[rank];
      if (in_rank) in_rank[rank] = 1;
      if (counts.per_domain && is_first_of_domain(row, k, place)) {
        ++counts.per_domain[place.domain_of_rank(rank)];
      }
    }
  }
}

/// Tokens of {begin, begin + step, ...} below `end` that go to `rank`. A warp's lane l counts its share with
/// (begin + l, end, 32) and the warp sums.
[[nodiscard]] DEEPEP_HD int32_t count_sent(const uint8_t* is_token_in_rank, int64_t num_ranks, int32_t rank,
                                           int64_t begin, int64_t end, int64_t step = 1) {
  int32_t count = 0;
  for (int64_t token = begin; token < end; token += step) {
    count += is_token_in_rank[token * num_ranks + rank] != 0;
  }
  return count;
}

/// Final rows of the tokens [begin, end) at every rank: rows[t, r] (int64 [T, R]), or -1 where t does not go
/// to r. next[r] (int64 [R]) comes in as the source's first row at r plus the count of the ranges before this
/// one, and goes out with this range's added.
DEEPEP_HD void fill_send_rows(const uint8_t* is_token_in_rank, int64_t num_ranks, int64_t begin, int64_t end,
                              int64_t* next, int64_t* rows) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
      const int64_t at = token * num_ranks + rank;
      rows[at] = take_next(is_token_in_rank[at] != 0, next[rank]);
    }
  }
}

}  // namespace deepep::layout
