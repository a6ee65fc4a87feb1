// The rules of csrc/layout run over whole arrays on the host. What bindings/core.cpp calls: plain addresses and
// sizes, so that this compiles without Python and bindings/core.cpp without the rules.
//
// Shapes are the caller's to check; values are checked here: std::invalid_argument names the argument.
// `num_parts`: the tokens are split into that many ranges, each counted and numbered apart, as blocks and
// warps of a kernel do it. The result does not depend on it.
// For the CPU alone.
#pragma once

#include <cstdint>

namespace deepep::host {

/// Row-major array of `rows` x `cols`.
template <class T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t cols;
};

/// Experts on ranks, ranks on domains, as layout::Placement has them.
struct Group {
  int64_t num_experts;
  int64_t num_ranks;
  int64_t ranks_per_domain;
};

/// Domains of the group, after checking it.
[[nodiscard]] int64_t num_domains(const Group& group);

/// Fills per_rank [R], per_domain [D], per_expert [E] and is_token_in_rank [T, R] from topk_idx [T, K].
template <class Index>
void dispatch_layout(Matrix<const Index> topk_idx, const Group& group, int32_t* per_rank, int32_t* per_domain,
                     int32_t* per_expert, uint8_t* is_token_in_rank);

/// masks [T]: the distinct ranks of each token as bits; at most 64 ranks.
template <class Index>
void rank_masks(Matrix<const Index> topk_idx, const Group& group, uint64_t* masks);

/// local [T, K]: the entries as `rank` sees them, its own experts' indices or -1.
template <class Index>
void local_topk(Matrix<const Index> topk_idx, const Group& group, int64_t rank, Index* local);

/// rows [R, R]: rows[s, r] is the first row of source s at rank
/// r; num_received [R]. counts [R, R] likewise [s, r].
void first_rows(Matrix<const int32_t> counts, int64_t* rows, int64_t* num_received);

/// rows [T, R]: final row of each token at each rank, or -1; first_rows [R]: this source's first row at each.
void send_rows(Matrix<const uint8_t> is_token_in_rank, const int64_t* first_rows, int64_t num_parts,
               int64_t* rows);

/// Tokens of one source that go to `rank`.
[[nodiscard]] int64_t count_sent(Matrix<const uint8_t> is_token_in_rank, int64_t rank);

/// Writes the source and token of the rows that `source` sends to `rank`, which begin at `first_row`.
void mark_rows(Matrix<const uint8_t> is_token_in_rank, int64_t source, int64_t rank, int64_t first_row,
               int32_t* src_rank, int32_t* src_token);

/// sources [n]: the source rank of rows 0 .. n - 1 of a receiver whose sources begin at first_rows [R].
void sources_of_rows(const int64_t* first_rows, int64_t num_ranks, int64_t num_rows, int32_t* sources);

/// begins [L], ends [L] and rows [N, K] of the expanded layout; returns its aligned total of rows.
template <class Index>
int64_t expanded_layout(Matrix<const Index> recv_topk_idx, int64_t num_local_experts, int64_t alignment,
                        int64_t num_parts, int64_t* begins, int64_t* ends, int64_t* rows);

/// rows_per_expert [E]: low-latency rows one source sends to each expert.
template <class Index>
void low_latency_counts(Matrix<const Index> topk_idx, const Group& group, int32_t* rows_per_expert);

/// ranges [L, R] and recv_count [L] of `rank`, from rows_per_expert [R, E], one line for each source.
void low_latency_ranges(Matrix<const int32_t> rows_per_expert, int64_t rank, int64_t* ranges,
                        int32_t* recv_count);

/// rows [T, K]: where each entry of `source`'s tokens lies in
/// the flattened output [L * R * M] of its expert's rank.
template <class Index>
void low_latency_send_rows(Matrix<const Index> topk_idx, Matrix<const int32_t> rows_per_expert, int64_t source,
                           int64_t num_max_tokens, int64_t num_parts, int64_t* rows);

/// The rank of `domain` that takes in what `source` sends there.
[[nodiscard]] int64_t forwarding_rank(const Group& group, int64_t source, int64_t domain);

/// The same among the ranks that are alive [R]; -1 where none of the domain's is.
[[nodiscard]] int64_t living_gateway(const Group& group, int64_t source, int64_t domain, const uint8_t* alive);

/// masks [T, D], position [T, D], counts [D] of the tokens a source sends to each domain.
void domain_positions(Matrix<const uint8_t> is_token_in_rank, const Group& group, int64_t num_parts,
                      uint64_t* masks, int32_t* position, int32_t* counts);

/// rows [n, domain_ranks] of the tokens one source sent to a
/// domain; first_rows [domain_ranks]: its first row at each rank.
void forwarded_rows(const uint64_t* masks, int64_t num_forwarded, const int64_t* first_rows,
                    int64_t domain_ranks, int64_t* rows);

}  // namespace deepep::host
