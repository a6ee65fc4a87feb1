// Final rows of a receiver: ascending (source rank, source token). With the [R, R] counts of one exchange
// every sender knows, without asking, where each of its tokens lies in every receiver's output.
#pragma once

#include "layout/arith.hpp"

namespace deepep::layout {

/// counts [R, R] int32, row-major: counts[s, d] tokens go from rank s to rank d.
struct CountMatrix {
  const int32_t* counts;
  int64_t num_ranks;

  [[nodiscard]] DEEPEP_HD constexpr int64_t operator()(int64_t source, int64_t destination) const {
    return counts[source * num_ranks + destination];
  }
};

/// First row of `source` at `destination`: all that lower ranks send there
/// lies before it. `count(s, d)` tokens go from s to d, from a CountMatrix or
/// wherever the counts arrived. source = R gives the rows received in all.
template <class Count>
[[nodiscard]] DEEPEP_HD constexpr int64_t first_row_of_source(const Count& count, int64_t source,
                                                              int64_t destination) {
  int64_t row = 0;
  DEEPEP_ROLLED
  for (int64_t s = 0; s < source; ++s) row += count(s, destination);
  return row;
}

/// The source of a received row: the last one whose rows begin at or before
/// it. Sources without rows begin where the next does, so "last" passes over
/// them. bases [R]: one receiver's row bases; 0 <= row < rows received.
[[nodiscard]] DEEPEP_HD constexpr int32_t source_of_row(const int64_t* bases, int32_t num_ranks, int64_t row) {
  int32_t low = 0, high = num_ranks;  // bases[low] <= row, and bases[high] > row or past the end
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (bases[middle] <= row ? low : high) = middle;
  }
  return low;
}

}  // namespace deepep::layout
