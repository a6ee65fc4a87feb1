// The counts that a dispatch posts to the host while it runs (kernels::HostCounts).
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <vector>

#include "host/launches.hpp"

namespace deepep::host {

[[nodiscard]] inline size_t host_counts_bytes(int num_ranks, int num_local_experts) {
  return offsetof(kernels::HostCounts, lists) +
         sizeof(uint64_t) * static_cast<size_t>(num_ranks * num_ranks + num_local_experts);
}

struct Counts {
  uint32_t phase;                    // 0, or why the dispatch stopped
  uint32_t num_rows;                 // for this rank
  uint32_t max_rows;                 // of any rank
  uint32_t num_returned;             // that combine brings back
  RowCounts table;                   // [R, R] rows from each rank to each
  std::vector<uint32_t> per_expert;  // top-k entries of each local expert
};

/// Polls until a dispatch has written all its words with `ticket`; nothing at the deadline.
[[nodiscard]] inline std::optional<Counts> wait_counts(const uint64_t* words, uint32_t ticket, int num_ranks,
                                                       int num_local_experts, double timeout_seconds) {
  constexpr size_t table = offsetof(kernels::HostCounts, lists) / sizeof(uint64_t);
  const size_t experts = table + static_cast<size_t>(num_ranks * num_ranks);
  std::vector<uint32_t> values(experts + static_cast<size_t>(num_local_experts));
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds);
  for (size_t i = 0; i < values.size(); ++i) {
    uint64_t word = 0;
    while (static_cast<uint32_t>((word = __atomic_load_n(words + i, __ATOMIC_ACQUIRE)) >> 32) != ticket)
      if (std::chrono::steady_clock::now() >= end) return std::nullopt;
    values[i] = static_cast<uint32_t>(word);
  }
  const auto begin = values.begin();
  return Counts{.phase = values[0],
                .num_rows = values[1],
                .max_rows = values[2],
                .num_returned = values[3],
                .table = {{begin + table, begin + static_cast<std::ptrdiff_t>(experts)}},
                .per_expert = {begin + static_cast<std::ptrdiff_t>(experts), values.end()}};
}

}  // namespace deepep::host
