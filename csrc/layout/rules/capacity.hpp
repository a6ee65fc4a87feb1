// How much can arrive at worst. Computed in 128 bits; the caller refuses what does not fit 64 (fits_int64).
// For the CPU alone: kernels are given sizes.
#pragma once

#include "layout/arith.hpp"

namespace deepep::layout {

/// Rows a rank can receive: every token of every rank, once.
[[nodiscard]] DEEPEP_HD constexpr wide_t max_rows_received(wide_t num_ranks, wide_t num_max_tokens) {
  return num_ranks * num_max_tokens;
}

/// Rows of the expanded (per-expert, aligned) layout: a token takes a row for each entry that names a local
/// expert: K of them, or min(K, L) when no token names an expert twice; and each expert may end up to
/// alignment - 1 rows short of its boundary.
[[nodiscard]] DEEPEP_HD constexpr wide_t max_rows_expanded(wide_t num_ranks, wide_t num_max_tokens,
                                                           wide_t num_topk, wide_t num_local_experts,
                                                           wide_t alignment, bool has_duplicates) {
  const wide_t rows_per_token = has_duplicates ? num_topk : min_of(num_topk, num_local_experts);
  const wide_t rows = max_rows_received(num_ranks, num_max_tokens) * rows_per_token;
  return align_up(rows + (alignment - 1) * num_local_experts, alignment);
}

}  // namespace deepep::layout
