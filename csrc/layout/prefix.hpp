// Splitting work into ranges, and prefix sums over what the ranges counted.
#pragma once

#include "layout/arith.hpp"

namespace deepep::layout {

/// Contiguous split of tokens [0, num_tokens) over `num_parts`
/// owners, in order; shares differ by at most one. Divides once, when it is made.
template <class Int>
struct SplitOf {
  constexpr SplitOf() = default;
  DEEPEP_HD constexpr SplitOf(Int num_tokens, Int num_parts)
      : each_(num_tokens / num_parts), longer_(num_tokens % num_parts) {}

  [[nodiscard]] DEEPEP_HD constexpr Int begin(Int part) const { return each_ * part + min_of(part, longer_); }
  [[nodiscard]] DEEPEP_HD constexpr Int end(Int part) const { return begin(part + 1); }

 private:
  Int each_;    // tokens of a share,
  Int longer_;  // but for the first so many shares, which have one more
};
using TokenSplit = SplitOf<int64_t>;

/// In place, over n values `stride` apart: each becomes the sum of those before it. Returns the sum of all.
template <class Count>
DEEPEP_HD constexpr Count exclusive_prefix(Count* values, int64_t n, int64_t stride = 1) {
  Count sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Count value = values[i * stride];
    values[i * stride] = sum;
    sum += value;
  }
  return sum;
}

/// How every numbering of a range goes: what is selected takes the next number, what is not gets -1. A range
/// starts from what the ranges before it counted.
template <class Int>
[[nodiscard]] DEEPEP_HD constexpr Int take_next(bool is_selected, Int& next) {
  return is_selected ? next++ : Int(-1);
}

}  // namespace deepep::layout
