// Rows of the low-latency output [L, R * M, H]: one for each distinct (token, expert), those of an expert
// packed from the front of its R * M rows in (source rank, source token) order.
// For the CPU alone, as what the kernels of the low-latency mode are compared with.
#pragma once

#include "layout/low_latency_rows.hpp"
#include "layout/placement.hpp"

namespace deepep::layout {

/// Adds to counts [E] the rows that tokens [begin, end) make at each expert: one for each distinct pair.
template <class Index>
DEEPEP_HD constexpr void count_expert_rows(const Index* topk_idx, int num_topk, int64_t begin, int64_t end,
                                           const Placement& place, int64_t* counts) {
  for (int64_t token = begin; token < end; ++token) {
    const Index* row = topk_idx + token * num_topk;
    for (int k = 0; k < num_topk; ++k) {
      if (is_first_of_expert(row, k, place)) ++counts[row[k]];
    }
  }
}

/// Number of each entry's row among its expert's, for tokens [begin, end): index [T, K], -1 where there is no
/// expert. next [E] comes in as the source's first row at each expert plus the counts of the ranges before
/// this one, and goes out with this range's added.
template <class Index>
DEEPEP_HD constexpr void fill_expert_rows(const Index* topk_idx, int num_topk, int64_t begin, int64_t end,
                                          const Placement& place, int64_t* next, int64_t* index) {
  for (int64_t token = begin; token < end; ++token) {
    const Index* row = topk_idx + token * num_topk;
    int64_t* out = index + token * num_topk;
    for (int k = 0; k < num_topk; ++k) {
      if (is_first_of_expert(row, k, place)) {
        out[k] = next[row[k]]++;
      } else {
        // No expert; or a duplicate, whose row is the last one that its expert was given.
        out[k] = place.is_expert(row[k]) ? next[row[k]] - 1 : -1;
      }
    }
  }
}

/// ranges[s] of one expert, from the rows_from[s * stride] that each source sends it. Returns their sum.
DEEPEP_HD constexpr int64_t fill_ranges(const int32_t* rows_from, int64_t num_ranks, int64_t stride,
                                        int64_t* ranges) {
  int64_t begin = 0;
  for (int64_t source = 0; source < num_ranks; ++source) {
    const int64_t count = rows_from[source * stride];
    ranges[source] = pack_range(begin, count);
    begin += count;
  }
  return begin;
}

}  // namespace deepep::layout
