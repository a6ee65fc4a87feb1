// The conversions between float32 and e4m3 in integers: what the hardware's cvt.rn.satfinite.e4m3x2.f32 does,
// bit by bit, and back.
#pragma once

#include <cstdint>

#include "layout/arith.hpp"

namespace deepep::dev {

/// Of a float32's bits: rounds to nearest even and saturates at 448. Every NaN becomes 0x7f.
[[nodiscard]] DEEPEP_HD constexpr uint32_t e4m3_of_bits(uint32_t bits) {
  constexpr uint32_t kInfinity = 0x7f800000, kMost = 0x43e00000, kLeastNormal = 0x3c800000;  // 448 and 2^-6
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 24) & 0x80;
  if (magnitude > kInfinity) return 0x7f;
  if (magnitude >= kMost) return sign | 0x7e;
  if (magnitude >= kLeastNormal) {
    // Three digits of the mantissa stay; the exponent's bias goes from 127 to 7. Just below 448 it rounds to
    // that.
    const uint32_t rounded = (magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
    return sign | (rounded - (120 << 3));
  }
  // Subnormal: units of 2^-9. Below half of one, 2^-10, nothing is left.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 117) return sign;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t shift = 141 - exponent;
  const uint32_t units = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  return sign | (units + (rest > half || (rest == half && (units & 1) != 0) ? 1 : 0));
}

/// The float32's bits of an e4m3 in the lowest byte; what is above is ignored. Both NaNs become 0x7fffffff.
[[nodiscard]] DEEPEP_HD constexpr uint32_t bits_of_e4m3(uint32_t byte) {
  const uint32_t sign = (byte & 0x80) << 24, magnitude = byte & 0x7f;
  if (magnitude == 0x7f) return 0x7fffffff;
  if (magnitude >= 8) return sign | ((magnitude << 20) + (120u << 23));
  // Subnormal, units of 2^-9: the leading one of 1 to 7 becomes the implicit one.
  if (magnitude == 0) return sign;
  const uint32_t leading = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;
  return sign | ((118 + leading) << 23) | ((magnitude << (23 - leading)) & 0x7fffff);
}

}  // namespace deepep::dev
