// The logistic function in fp32, of roundings that every body makes alike: the same bits everywhere.
#pragma once

#include "device/device.hpp"

namespace deepep::kernels {

/// e^-a for a from 0 on, to 2 units in the last place; 0 above 86, where a float32 would soon be subnormal.
[[nodiscard]] DEEPEP_DEVICE float exp_of_negative(float a) {
  using namespace dev;
  if (!(a <= 86.0f)) return 0.0f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  const float shifted = add_rounded(mul_rounded(a, -1.44269504f), kShift);
  const float n = add_rounded(shifted, -kShift);  // -a / ln 2, to the nearest integer
  // ln 2 in two parts: n times the first is exact.
  const float high = add_rounded(-a, mul_rounded(n, -0.693359375f));
  const float r = add_rounded(high, mul_rounded(n, 2.12194440e-4f));
  float sum = 1.0f / 720.0f;  // Taylor's, for |r| <= 0.35: the next term is 2^-24 of the sum and less
  sum = add_rounded(mul_rounded(sum, r), 1.0f / 120.0f);
  sum = add_rounded(mul_rounded(sum, r), 1.0f / 24.0f);
  sum = add_rounded(mul_rounded(sum, r), 1.0f / 6.0f);
  sum = add_rounded(mul_rounded(sum, r), 0.5f);
  sum = add_rounded(mul_rounded(sum, r), 1.0f);
  sum = add_rounded(mul_rounded(sum, r), 1.0f);
  const uint32_t exponent = bits_of(shifted) - bits_of(kShift);  // n, in two's complement
  return float_of_bits(bits_of(sum) + (exponent << 23));
}

/// 1 / (1 + e^-x); NaN for NaN.
[[nodiscard]] DEEPEP_DEVICE float logistic(float x) {
  using namespace dev;
  if (x != x) return x;
  const float t = exp_of_negative(float_of_bits(bits_of(x) & 0x7fffffffu));
  return div_rounded(x < 0.0f ? t : 1.0f, add_rounded(1.0f, t));
}

}  // namespace deepep::kernels
