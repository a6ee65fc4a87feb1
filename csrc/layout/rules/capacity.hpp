// How much can arrive at worst, and the size hints of the public interface. Computed in 128 bits; the caller
// refuses what does not fit 64 (fits_int64).
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

/// What Config's hints reckon with: the chunked-queue sizes of the first interface, kept so that a client's
/// buffer arithmetic gives the numbers it knows. A channel is a
/// pair of SMs.
struct QueueSizes {
  wide_t num_channels;
  wide_t num_max_nvl_chunked_recv_tokens;
  wide_t num_max_rdma_chunked_recv_tokens;

  static constexpr int kNodeRanks = 8;

  [[nodiscard]] static constexpr wide_t num_nodes(wide_t num_ranks) { return ceil_div(num_ranks, kNodeRanks); }

  /// One queued token: its row, 8 bytes of source, and room for
  /// 128 indices (8 bytes), weights and scales (4 each).
  [[nodiscard]] static constexpr wide_t token_bytes(wide_t hidden_bytes) {
    return hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4;
  }

  [[nodiscard]] constexpr wide_t nvl_bytes(wide_t hidden_bytes, wide_t num_ranks) const {
    const wide_t words = 2 * num_nodes(num_ranks) + 3;  // heads, tails, prefixes of a (channel, peer)
    const wide_t queue = num_max_nvl_chunked_recv_tokens * token_bytes(hidden_bytes);
    return align_up(num_channels * min_of<wide_t>(num_ranks, kNodeRanks) * (words * 4 + queue), 128);
  }

  [[nodiscard]] constexpr wide_t rdma_bytes(wide_t hidden_bytes, wide_t num_ranks) const {
    if (num_ranks <= kNodeRanks) return 0;
    const wide_t words = (kNodeRanks * 2 + 2) * 2;  // sent and received
    const wide_t queue = 2 * num_max_rdma_chunked_recv_tokens * (token_bytes(hidden_bytes) + 16);
    return align_up(num_channels * num_nodes(num_ranks) * (words * 4 + queue), 128);
  }
};

}  // namespace deepep::layout
