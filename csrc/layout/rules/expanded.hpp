// The expanded layout: one row for each top-k entry that names a local expert,
// grouped by expert, each group starting on a multiple of the alignment, as a
// grouped GEMM wants it. Inside an expert: ascending received row, then k.
// For the CPU alone: no kernel writes this layout.
#pragma once

#include "layout/arith.hpp"

namespace deepep::layout {

/// Adds the entries of received rows [begin, end) to counts [L]. recv_topk_idx [N, K]: local expert or -1.
template <class Index>
DEEPEP_HD constexpr void count_expanded(const Index* recv_topk_idx, int64_t num_topk, int64_t begin,
                                        int64_t end, int64_t* counts) {
  for (int64_t i = begin * num_topk; i < end * num_topk; ++i) {
    if (recv_topk_idx[i] >= 0) ++counts[recv_topk_idx[i]];
  }
}

/// begins[l], the first row of expert l: where expert l - 1 ends, rounded up to `alignment`. Expert l ends at
/// begins[l] + counts[l], and the rows from there to begins[l + 1] are padding. Returns the aligned total.
DEEPEP_HD constexpr int64_t expanded_begins(const int64_t* counts, int64_t num_local_experts, int64_t alignment,
                                            int64_t* begins) {
  int64_t row = 0;
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    begins[expert] = row;
    row = align_up(row + counts[expert], alignment);
  }
  return row;
}

/// rows[n, k] of the entries of received rows [begin, end), -1 where there is no local expert. next [L] comes
/// in as begins plus the counts of the ranges before this one, and goes out with this range's added.
template <class Index>
DEEPEP_HD constexpr void fill_expanded_rows(const Index* recv_topk_idx, int64_t num_topk, int64_t begin,
                                            int64_t end, int64_t* next, int64_t* rows) {
  for (int64_t i = begin * num_topk; i < end * num_topk; ++i) {
    rows[i] = recv_topk_idx[i] >= 0 ? next[recv_topk_idx[i]]++ : -1;
  }
}

}  // namespace deepep::layout
