// LogFMT, value by value: reference/logfmt.py says the same, step by step. A step is one of integers, or one
// of float32 that is rounded once.
#pragma once

#include "kernels/low_latency/common.hpp"

namespace deepep::kernels {

inline constexpr int kLogUnitBits = 21;      // a logarithm is a number of units of 2^-21
inline constexpr int kLogFractionBits = 23;  // as many as a float32 has
inline constexpr int kLogStepBits = 35;
inline constexpr int kLogSteps = 510;
inline constexpr int kLog2OfZero = -(1 << 30);
inline constexpr int kLogRange = 32 << kLogUnitBits;

/// constant + x * (factors[0] + x * (factors[1] + ...)).
template <int kCount>
[[nodiscard]] DEEPEP_DEVICE float polynomial(float x, const float (&factors)[kCount], float constant) {
  using namespace dev;
  float value = factors[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) value = add_rounded(mul_rounded(value, x), factors[i]);
  return add_rounded(mul_rounded(value, x), constant);
}

/// The logarithm, in units, of the magnitude whose bf16 bits these are.
[[nodiscard]] DEEPEP_DEVICE int log2_of(uint32_t magnitude) {
  using namespace dev;
  constexpr float kFactors[] = {3025495.75f,      -1511221.75f,    993448.9375f,   -684602.4375f,
                                409381.28125f, -168416.140625f, 33067.77734375f};
  const uint32_t bits = bits_of(mul_rounded(float_of_bits(magnitude << 16), 65536.0f));  // not subnormal
  const float x = add_rounded(float_of_bits((bits & 0x7fffffu) | 0x3f800000u), -1.0f);
  // What is added last is so large that the sum is rounded to a whole number, which its lowest bits are.
  const int fraction = static_cast<int>(bits_of(polynomial(x, kFactors, 8388608.0f)) - (150u << 23));
  const int exponent = static_cast<int>(bits >> 23) - (127 + 16);
  return magnitude == 0 ? kLog2OfZero : exponent * (1 << kLogUnitBits) + fraction;
}

/// 2^(whole + above / 2^23), of a sum from -200 on.
[[nodiscard]] DEEPEP_DEVICE float exp2_of(int whole, uint32_t above) {
  using namespace dev;
  constexpr float kFactors[] = {0.6931517f, 0.2401594f, 0.055818193f, 0.008991657f, 0.0018790114f};
  const float x = add_rounded(float_of_bits((above & 0x7fffffu) | 0x3f800000u), -1.0f);
  const uint32_t mantissa = bits_of(polynomial(x, kFactors, 1.0f));
  const int exponent = whole + static_cast<int>(above >> kLogFractionBits);
  const int normal = layout::max_of(exponent, -126);  // the others are rounded once, by the product
  const float value = float_of_bits(mantissa + (static_cast<uint32_t>(normal) << 23));
  return mul_rounded(value, float_of_bits(static_cast<uint32_t>(exponent - normal + 127) << 23));
}

/// What travels of a group: its largest magnitude, and its smallest above it.
struct LogfmtMeta {
  uint32_t word;

  [[nodiscard]] DEEPEP_DEVICE uint32_t largest() const { return word & 0xffffu; }
  [[nodiscard]] DEEPEP_DEVICE uint32_t smallest() const { return word >> 16; }
  /// Whether its chunk may be encoded: by bits, which are in the order of magnitudes. A NaN is above all.
  [[nodiscard]] DEEPEP_DEVICE bool is_good() const { return smallest() < largest() && largest() < 0x3f80u; }
};

/// Of a group, in units; 1 at least.
struct LogfmtScale {
  int low;
  int range;
};

[[nodiscard]] DEEPEP_DEVICE LogfmtScale scale_of(LogfmtMeta meta) {
  const int high = log2_of(meta.largest());
  const int low = layout::max_of(log2_of(meta.smallest()), high - kLogRange);
  return {low, layout::max_of(high - low, 1)};
}

/// How a group is encoded.
struct LogfmtEncoder {
  int low;
  float steps_of_unit;
  float first;

  [[nodiscard]] DEEPEP_DEVICE static LogfmtEncoder of(LogfmtMeta meta) {
    using namespace dev;
    const LogfmtScale scale = scale_of(meta);
    const float reach = static_cast<float>(scale.range);
    return {scale.low, div_rounded(static_cast<float>(kLogSteps), reach),
            add_rounded(1.5f, -mul_rounded(reach, 8.1009394e-11f))};
  }
  /// Ten bits: magnitude, and sign above it. Of the bf16 with these bits, in a group that qualifies.
  [[nodiscard]] DEEPEP_DEVICE uint32_t code(uint32_t value) const {
    using namespace dev;
    const int distance = log2_of(value & 0x7fffu) - low;
    const float steps = add_rounded(mul_rounded(static_cast<float>(distance), steps_of_unit), first);
    return static_cast<uint32_t>(steps < 0.0f ? 0 : static_cast<int>(steps)) | (value & 0x8000u) >> 6;
  }
};

/// How it is decoded.
struct LogfmtDecoder {
  int low;
  uint32_t step;

  [[nodiscard]] DEEPEP_DEVICE static LogfmtDecoder of(LogfmtMeta meta) {
    const LogfmtScale scale = scale_of(meta);
    const uint64_t range = static_cast<uint64_t>(scale.range) << (kLogStepBits - kLogUnitBits);
    return {scale.low, static_cast<uint32_t>((range + kLogSteps / 2) / kLogSteps)};
  }
  /// The value of a code of ten bits.
  [[nodiscard]] DEEPEP_DEVICE float value(uint32_t code) const {
    using namespace dev;
    constexpr int kFiner = kLogStepBits - kLogFractionBits;
    constexpr int kCoarser = kLogFractionBits - kLogUnitBits;
    const uint32_t magnitude = code & 0x1ffu;
    const uint64_t steps = static_cast<uint64_t>(layout::max_of(static_cast<int>(magnitude) - 1, 0)) * step;
    const auto above = static_cast<uint32_t>((steps + (1u << (kFiner - 1))) >> kFiner);
    const uint32_t fraction = static_cast<uint32_t>(low & ((1 << kLogUnitBits) - 1)) << kCoarser;
    const float value = magnitude == 0 ? 0.0f : exp2_of(low >> kLogUnitBits, fraction + above);
    return float_of_bits(bits_of(value) | (code & 0x200u) << 22);
  }
};

/// Eight codes: two words, and the half of one.
struct LogfmtCodes {
  uint32_t low;
  uint32_t high;
  uint32_t rest;
};

[[nodiscard]] DEEPEP_DEVICE LogfmtCodes encode(const LogfmtEncoder& group, const dev::Vec16& piece) {
  uint32_t code[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    code[i] = group.code(i % 2 == 0 ? piece.w[i / 2] & 0xffffu : piece.w[i / 2] >> 16);
  return {code[0] | code[1] << 10 | code[2] << 20 | code[3] << 30,
          code[3] >> 2 | code[4] << 8 | code[5] << 18 | code[6] << 28, code[6] >> 4 | code[7] << 6};
}

/// Of a piece whose codes these are, channel i.
[[nodiscard]] DEEPEP_DEVICE uint32_t code_of(const LogfmtCodes& codes, int i) {
  switch (i) {
    case 3: return codes.low >> 30 | (codes.high & 0xffu) << 2;
    case 6: return codes.high >> 28 | (codes.rest & 0x3fu) << 4;
    case 7: return (codes.rest >> 6) & 0x3ffu;
    default: return (i < 3 ? codes.low >> (10 * i) : codes.high >> (10 * i - 32)) & 0x3ffu;
  }
}

}  // namespace deepep::kernels
