// Numbers of the rows of the low-latency output [L, R * M, H], as the interface and the kernels have them.
#pragma once

#include <cstdint>

#include "layout/arith.hpp"

namespace deepep::layout {

/// The part of an expert's rows that one source fills, as the interface returns it: (begin << 32) | count.
[[nodiscard]] DEEPEP_HD constexpr int64_t pack_range(int64_t begin, int64_t count) {
  return int64_t(uint64_t(begin) << 32 | uint64_t(uint32_t(count)));
}
[[nodiscard]] DEEPEP_HD constexpr int64_t range_begin(int64_t range) { return int64_t(uint64_t(range) >> 32); }
[[nodiscard]] DEEPEP_HD constexpr int64_t range_count(int64_t range) { return int64_t(uint32_t(range)); }

/// Row of the flattened output [L * R * M] that is number `index` of a local expert.
[[nodiscard]] DEEPEP_HD constexpr int64_t packed_row(int64_t num_ranks, int64_t num_max_tokens,
                                                     int64_t local_expert, int64_t index) {
  return local_expert * (num_ranks * num_max_tokens) + index;
}

}  // namespace deepep::layout
