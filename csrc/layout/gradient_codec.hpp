// Gradients on the wire: narrow floating-point codes with a power-of-two scale per block, and fixed point.
// Kernels and the CPU run these, so both give the same bits.
//
// A block is 128 consecutive elements, the last one of a message perhaps fewer. A message is its elements'
// codes, then, for formats that have them, one scale byte per block.
//
// A scale byte s stands for 2^(s - 127), the smallest power of two by which the block's largest magnitude fits
// the format. 255: the block holds an infinity or a NaN, and all of it is read as NaN, on every rank.
// Products with a scale are exact, down to where float32 itself runs out of bits.
#pragma once

#include <cstdint>

#include "layout/arith.hpp"

namespace deepep::layout {

inline constexpr int64_t kGradientBlock = 128;
inline constexpr uint8_t kNotFinite = 255;
inline constexpr uint32_t kMagnitude = 0x7FFFFFFF, kFloatInfinity = 0x7F800000, kFloatNan = 0x7FC00000;

/// FP8 with four bits of exponent and three of mantissa: its largest value is 448 = 1.75 * 2^8.
struct E4M3 {
  using Code = uint8_t;
  static constexpr int kMantissa = 3, kMinExponent = -6, kTopExponent = 8;
  static constexpr uint32_t kTopMantissa = 0x600000;
  static constexpr bool kHasScale = true;
};

/// IEEE half precision, whose block is scaled below 2^15: nothing overflows.
struct Half {
  using Code = uint16_t;
  static constexpr int kMantissa = 10, kMinExponent = -14, kTopExponent = 14;
  static constexpr uint32_t kTopMantissa = 0x7FFFFF;
  static constexpr bool kHasScale = true;
};

/// The upper half of a float32: the same range, so it needs no scale, and infinities stay what they are.
struct Bfloat {
  using Code = uint16_t;
  static constexpr int kMantissa = 7, kMinExponent = -126;
  static constexpr bool kHasScale = false;
};

[[nodiscard]] DEEPEP_HD constexpr uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
[[nodiscard]] DEEPEP_HD constexpr float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

/// One of two words without a branch, so that loops over elements become vector instructions.
[[nodiscard]] DEEPEP_HD constexpr uint32_t select(bool is_first, uint32_t first, uint32_t second) {
  const uint32_t mask = 0u - uint32_t(is_first);
  return (first & mask) | (second & ~mask);
}

/// 2^exponent, for exponents of normal numbers.
[[nodiscard]] DEEPEP_HD constexpr float power_of_two(int exponent) {
  return float_of(uint32_t(exponent + 127) << 23);
}

[[nodiscard]] DEEPEP_HD constexpr int64_t num_gradient_blocks(int64_t count) {
  return ceil_div(count, kGradientBlock);
}

/// Bytes of a message of `count` elements.
template <class Format>
[[nodiscard]] DEEPEP_HD constexpr int64_t message_bytes(int64_t count) {
  return count * int64_t(sizeof(typename Format::Code)) + (Format::kHasScale ? num_gradient_blocks(count) : 0);
}

/// 32 bits that depend on nothing but a message's key and an element's place: the dice of stochastic rounding,
/// which fall alike on every device.
struct RoundingKey {
  uint32_t first, second;
  [[nodiscard]] DEEPEP_HD constexpr uint32_t draw(uint32_t index) const {
    uint32_t h = index * 0x9E3779B1u + first;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu ^ second;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
  }
};

/// The scale byte of a block, of the bits of its largest magnitude.
template <class Format>
[[nodiscard]] DEEPEP_HD constexpr uint8_t scale_of(uint32_t largest) {
  if (largest >= kFloatInfinity) return kNotFinite;
  const int is_above = (largest & 0x7FFFFF) > Format::kTopMantissa;
  return uint8_t(max_of(int(largest >> 23) - Format::kTopExponent + is_above, 1));
}

/// The code of a finite value that fits the format. Nearest: ties go to even. Else away from zero with a
/// probability that is the part cut off, by the upper bits of `dice`: right on average.
template <class Format, bool kNearest>
[[nodiscard]] DEEPEP_HD constexpr uint32_t code_of(float value, uint32_t dice) {
  constexpr int kCut = 23 - Format::kMantissa;
  constexpr uint32_t kRebias = uint32_t(126 + Format::kMinExponent) << Format::kMantissa;
  constexpr uint32_t kMinNormal = uint32_t(127 + Format::kMinExponent) << 23;
  const uint32_t bits = bits_of(value), magnitude = bits & kMagnitude;
  const uint32_t sign = bits >> 31 << (8 * sizeof(typename Format::Code) - 1);
  uint32_t normal = 0, small = 0;  // of magnitudes from 2^kMinExponent, and of those below
  if constexpr (kNearest) {
    normal = ((magnitude + ((1u << (kCut - 1)) - 1) + (magnitude >> kCut & 1)) >> kCut) - kRebias;
  } else {
    normal = ((magnitude + (dice >> (32 - kCut))) >> kCut) - kRebias;
  }
  if constexpr (!Format::kHasScale) {
    return sign | normal;  // the range of float32: below the smallest normal value the same bits are cut
  } else if constexpr (kNearest) {
    constexpr float kUnit = power_of_two(Format::kMinExponent - Format::kMantissa + 23);  // rounds to a step
    small = bits_of(float_of(magnitude) + kUnit) - bits_of(kUnit);
  } else {
    const uint32_t above = bits_of(float_of(magnitude) + power_of_two(Format::kMinExponent));
    small = ((above + (dice >> (32 - kCut))) >> kCut) - (kMinNormal >> kCut);
  }
  return sign | select(magnitude < kMinNormal, small, normal);
}

/// The same of any value: bfloat16 has infinities, which round to themselves, and one NaN.
template <bool kNearest>
[[nodiscard]] DEEPEP_HD constexpr uint32_t bfloat_code(float value, uint32_t dice) {
  const bool is_nan = (bits_of(value) & kMagnitude) > kFloatInfinity;
  return select(is_nan, kFloatNan >> 16, code_of<Bfloat, kNearest>(value, dice));
}

/// The value of a code, before its scale.
template <class Format>
[[nodiscard]] DEEPEP_HD constexpr float value_of(uint32_t code) {
  constexpr int kCut = 23 - Format::kMantissa, kSign = 8 * sizeof(typename Format::Code) - 1;
  constexpr uint32_t kRebias = uint32_t(126 + Format::kMinExponent) << 23;
  const uint32_t magnitude = code & ((1u << kSign) - 1), sign = code >> kSign << 31;
  if constexpr (!Format::kHasScale) {
    return float_of(sign | magnitude << kCut);
  } else {
    const float small = float(int32_t(magnitude)) * power_of_two(Format::kMinExponent - Format::kMantissa);
    const uint32_t normal = (magnitude << kCut) + kRebias;
    return float_of(sign | select(magnitude < 1u << Format::kMantissa, bits_of(small), normal));
  }
}

/// 32-bit fixed point: all ranks scale a block by the largest exponent that any of them has in it, so the sum
/// of their integers is exact, whatever its order. The exponent byte is float32's own, 255 as above.
/// Each integer has 30 - headroom bits and a sign, and 2^headroom ranks' sum fits.
struct FixedPoint {
  uint8_t exponent;
  int32_t headroom;

  [[nodiscard]] DEEPEP_HD constexpr int shift() const { return 156 - headroom - int(exponent); }
  // A power of two may lie outside of float32 where its two halves do not.
  [[nodiscard]] DEEPEP_HD constexpr float half_scale() const { return power_of_two(shift() >> 1); }
  [[nodiscard]] DEEPEP_HD constexpr float other_half_scale() const {
    return power_of_two(shift() - (shift() >> 1));
  }
  [[nodiscard]] DEEPEP_HD constexpr float half_unit() const { return power_of_two(-(shift() >> 1)); }
  [[nodiscard]] DEEPEP_HD constexpr float other_half_unit() const {
    return power_of_two((shift() >> 1) - shift());
  }
};

/// A float32 of magnitude below 2^31, rounded to an integer, ties to even.
[[nodiscard]] DEEPEP_HD constexpr int32_t nearest_integer(float value) {
  constexpr float kUnit = power_of_two(23);  // magnitudes from there on are integers
  const uint32_t bits = bits_of(value), sign = bits & ~kMagnitude;
  const float magnitude = float_of(bits & kMagnitude);
  const float rounded = (magnitude + kUnit) - kUnit;
  return int32_t(float_of(sign | select(magnitude < kUnit, bits_of(rounded), bits_of(magnitude))));
}

}  // namespace deepep::layout
