// Integer arithmetic every layout rule shares. 64-bit throughout: byte offsets pass 2^31 at real sizes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DEEPEP_HD __host__ __device__ __forceinline__
#else
#define DEEPEP_HD inline
#endif

namespace deepep::core {

/// ceil(a / b) for a >= 0, b > 0.
[[nodiscard]] DEEPEP_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The smallest multiple of `unit` that is >= a.
[[nodiscard]] DEEPEP_HD constexpr int64_t align_up(int64_t a, int64_t unit) {
  return ceil_div(a, unit) * unit;
}

}  // namespace deepep::core
