// Integer arithmetic every layout rule shares. 64-bit throughout: byte offsets pass 2^31 at real sizes.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define DEEPEP_HD __host__ __device__ __forceinline__
/// Before a loop over ranks: a kernel has many, and what it unrolls it must fetch (docs/kernels.md).
#define DEEPEP_ROLLED _Pragma("unroll 1")
#else
#define DEEPEP_HD inline
#define DEEPEP_ROLLED
#endif

namespace deepep::layout {

/// 128 bits: wide enough for any size formula over 64-bit inputs as small as
/// ours. A layout struct is a template over its integer, so the host evaluates
/// the very formula the device uses and sees whether 64 bits hold it.
__extension__ using wide_t = __int128;

/// The integer a formula over A and B is computed in: never narrower than 64 bits.
template <class A, class B = A>
using at_least_64 = std::common_type_t<A, B, int64_t>;

/// ceil(a / b) for a >= 0, b > 0.
template <class A, class B>
[[nodiscard]] DEEPEP_HD constexpr at_least_64<A, B> ceil_div(A a, B b) {
  using Int = at_least_64<A, B>;
  return (Int(a) + Int(b) - 1) / Int(b);
}

/// The smallest multiple of `unit` that is >= a, for a >= 0, unit > 0.
template <class A, class B>
[[nodiscard]] DEEPEP_HD constexpr at_least_64<A, B> align_up(A a, B unit) {
  using Int = at_least_64<A, B>;
  return ceil_div(Int(a), Int(unit)) * Int(unit);
}

template <class Int>
[[nodiscard]] DEEPEP_HD constexpr Int min_of(Int a, Int b) {
  return a < b ? a : b;
}

template <class Int>
[[nodiscard]] DEEPEP_HD constexpr Int max_of(Int a, Int b) {
  return a < b ? b : a;
}

/// Division by a number that is known beforehand, without a division: exact while n * by < 2^32.
struct Divisor {
  Divisor() = default;
  DEEPEP_HD constexpr explicit Divisor(int number)
      : by(number),
        inverse_(((uint64_t{1} << 32) + static_cast<uint64_t>(number) - 1) / static_cast<uint64_t>(number)) {}

  [[nodiscard]] DEEPEP_HD constexpr int quotient(int n) const {
    return static_cast<int>((static_cast<uint64_t>(n) * inverse_) >> 32);
  }
  [[nodiscard]] DEEPEP_HD constexpr int remainder(int n) const { return n - quotient(n) * by; }

  int by;

 private:
  uint64_t inverse_;  // 2^32 / by, rounded up
};

/// Whether a size computed in 128 bits can be used as a 64-bit
/// byte offset. What does not fit is refused on the host.
[[nodiscard]] DEEPEP_HD constexpr bool fits_int64(wide_t value) {
  return value >= 0 && value <= wide_t(INT64_MAX);
}

}  // namespace deepep::layout
