// Where experts and ranks live, and which entry of a token's
// top-k row counts for a rank, a domain or an expert.
#pragma once

#include "layout/arith.hpp"

namespace deepep::layout {

/// Top-k rows are at most this wide: sizes that are fixed before the first top-k row is seen reckon with it.
inline constexpr int kMaxTopk = 32;

/// Contiguous blocks: expert e lives on rank e / experts_per_rank, rank r in domain r / ranks_per_domain.
/// num_experts is a multiple of num_ranks; the last domain may be smaller than the others.
struct Placement {
  int32_t num_experts;
  int32_t num_ranks;
  int32_t ranks_per_domain;
  int32_t experts_per_rank;

  DEEPEP_HD constexpr Placement(int32_t experts, int32_t ranks, int32_t domain_size)
      : num_experts(experts),
        num_ranks(ranks),
        ranks_per_domain(domain_size),
        experts_per_rank(experts / ranks) {}

  [[nodiscard]] DEEPEP_HD constexpr int32_t num_domains() const {
    return int32_t(ceil_div(num_ranks, ranks_per_domain));
  }
  /// False for -1 ("no expert"). Other entries outside [0, num_experts) are refused on the host; on the
  /// device they count nowhere rather than reach outside an array.
  template <class Index>
  [[nodiscard]] DEEPEP_HD constexpr bool is_expert(Index entry) const {
    return entry >= 0 && entry < num_experts;
  }
  [[nodiscard]] DEEPEP_HD constexpr int32_t rank_of_expert(int32_t expert) const {
    return expert / experts_per_rank;
  }
  [[nodiscard]] DEEPEP_HD constexpr int32_t domain_of_rank(int32_t rank) const {
    return rank / ranks_per_domain;
  }
  [[nodiscard]] DEEPEP_HD constexpr int32_t first_rank_of_domain(int32_t domain) const {
    return domain * ranks_per_domain;
  }
  [[nodiscard]] DEEPEP_HD constexpr int32_t num_ranks_of_domain(int32_t domain) const {
    return min_of(ranks_per_domain, num_ranks - first_rank_of_domain(domain));
  }
  [[nodiscard]] DEEPEP_HD constexpr int32_t first_expert_of_rank(int32_t rank) const {
    return rank * experts_per_rank;
  }
  /// The expert's index on `rank`, or -1 if it lives elsewhere or
  /// is none: what a receiver sees of a top-k entry.
  template <class Index>
  [[nodiscard]] DEEPEP_HD constexpr int32_t local_expert(Index entry, int32_t rank) const {
    return is_expert(entry) && rank_of_expert(int32_t(entry)) == rank
               ? int32_t(entry) - first_expert_of_rank(rank)
               : -1;
  }
};

/// Whether one of row[0 .. count) lies in [first, end). With `first` >= 0 a -1 never does.
template <class Index>
[[nodiscard]] DEEPEP_HD constexpr bool any_within(const Index* row, int count, int32_t first, int32_t end) {
  for (int j = 0; j < count; ++j) {
    if (row[j] >= first && row[j] < end) return true;
  }
  return false;
}

/// Whether entry k is the first of its row that selects its rank: a token goes
/// to a rank once, however many of its entries point there. One division, then
/// comparisons: every entry of the rank lies in one range of experts.
template <class Index>
[[nodiscard]] DEEPEP_HD constexpr bool is_first_of_rank(const Index* row, int k, const Placement& place) {
  if (!place.is_expert(row[k])) return false;
  const int32_t first = place.first_expert_of_rank(place.rank_of_expert(int32_t(row[k])));
  return !any_within(row, k, first, first + place.experts_per_rank);
}

/// The same for the entry's domain.
template <class Index>
[[nodiscard]] DEEPEP_HD constexpr bool is_first_of_domain(const Index* row, int k, const Placement& place) {
  if (!place.is_expert(row[k])) return false;
  const int32_t domain = place.domain_of_rank(place.rank_of_expert(int32_t(row[k])));
  const int32_t first = place.first_expert_of_rank(place.first_rank_of_domain(domain));
  return !any_within(row, k, first, first + place.num_ranks_of_domain(domain) * place.experts_per_rank);
}

/// The same for the expert itself: duplicates of an expert inside a token share one low-latency row.
template <class Index>
[[nodiscard]] DEEPEP_HD constexpr bool is_first_of_expert(const Index* row, int k, const Placement& place) {
  if (!place.is_expert(row[k])) return false;
  const int32_t expert = int32_t(row[k]);
  return !any_within(row, k, expert, expert + 1);
}

/// The distinct ranks of a token as bits, for num_ranks <= 64: bit r is set when some entry selects rank r.
template <class Index>
[[nodiscard]] DEEPEP_HD constexpr uint64_t rank_mask(const Index* row, int num_topk, const Placement& place) {
  uint64_t mask = 0;
  for (int k = 0; k < num_topk; ++k) {
    if (place.is_expert(row[k])) mask |= uint64_t(1) << place.rank_of_expert(int32_t(row[k]));
  }
  return mask;
}

}  // namespace deepep::layout
