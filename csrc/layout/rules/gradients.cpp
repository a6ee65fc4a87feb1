// For the CPU alone: the gradient codec over arrays, block by block. One thread: on hosts without GPUs every
// core has a rank of its own.
#include "layout/rules/gradients.hpp"

#include <cstring>

#include "layout/rules/check.hpp"
#include "layout/gradient_codec.hpp"

// A version of each loop for AVX2, chosen when the library is loaded. It has no fused multiply-add, and
// would give the same bits if it had: the products are exact.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DEEPEP_VECTORISED __attribute__((optimize("O3"), target_clones("avx2", "default")))
#else
#define DEEPEP_VECTORISED
#endif

namespace deepep::host {

namespace {

using namespace deepep::layout;

/// The blocks of `count` elements: visit(block, first element, elements).
template <class Visit>
inline __attribute__((always_inline)) void for_each_block(int64_t count, const Visit& visit) {
  for (int64_t first = 0; first < count; first += kGradientBlock) {
    visit(first / kGradientBlock, first, min_of(kGradientBlock, count - first));
  }
}

inline __attribute__((always_inline)) uint32_t largest_magnitude(const float* values, int64_t count) {
  int32_t largest = 0;  // magnitudes are ordered as integers, signed ones too
  for (int64_t i = 0; i < count; ++i) largest = max_of(largest, int32_t(bits_of(values[i]) & kMagnitude));
  return uint32_t(largest);
}

template <class Format, bool kNearest>
inline __attribute__((always_inline)) void encode_blocks(const float* values, int64_t count, Rounding rounding,
                                                         uint8_t* message) {
  using Code = typename Format::Code;
  const RoundingKey key{rounding.first_key, rounding.second_key};
  uint8_t* scales = message + count * int64_t(sizeof(Code));
  for_each_block(count, [&](int64_t block, int64_t first, int64_t length) {
    const float* from = values + first;
    Code codes[kGradientBlock];
    const uint32_t index = rounding.first_index + uint32_t(first);
    if constexpr (Format::kHasScale) {
      const uint8_t scale = scale_of<Format>(largest_magnitude(from, length));
      scales[block] = scale;
      if (scale == kNotFinite) {
        std::memset(codes, 0, sizeof codes);
      } else {
        const float factor = power_of_two(127 - int(scale));
        for (int64_t i = 0; i < length; ++i) {
          const uint32_t dice = kNearest ? 0 : key.draw(index + uint32_t(i));
          codes[i] = Code(code_of<Format, kNearest>(from[i] * factor, dice));
        }
      }
    } else {
      for (int64_t i = 0; i < length; ++i) {
        codes[i] = Code(bfloat_code<kNearest>(from[i], kNearest ? 0 : key.draw(index + uint32_t(i))));
      }
    }
    std::memcpy(message + first * int64_t(sizeof(Code)), codes, size_t(length) * sizeof(Code));
  });
}

template <class Format, bool kIsAdded>
inline __attribute__((always_inline)) void decode_blocks(const uint8_t* message, int64_t count,
                                                         float* values) {
  using Code = typename Format::Code;
  const uint8_t* scales = message + count * int64_t(sizeof(Code));
  for_each_block(count, [&](int64_t block, int64_t first, int64_t length) {
    float* into = values + first;
    Code codes[kGradientBlock];  // a message may begin anywhere
    std::memcpy(codes, message + first * int64_t(sizeof(Code)), size_t(length) * sizeof(Code));
    float factor = 1;
    if constexpr (Format::kHasScale) {
      const uint8_t scale = scales[block];
      factor = scale == kNotFinite ? float_of(kFloatNan) : power_of_two(int(scale) - 127);
    }
    for (int64_t i = 0; i < length; ++i) {
      const float value = value_of<Format>(codes[i]) * factor;
      into[i] = kIsAdded ? into[i] + value : value;
    }
  });
}

#define DEEPEP_LOOPS(Format)                                                                            \
  DEEPEP_VECTORISED void encode_nearest(Format, const float* v, int64_t n, Rounding r, uint8_t* m) {    \
    encode_blocks<Format, true>(v, n, r, m);                                                            \
  }                                                                                                     \
  DEEPEP_VECTORISED void encode_stochastic(Format, const float* v, int64_t n, Rounding r, uint8_t* m) { \
    encode_blocks<Format, false>(v, n, r, m);                                                           \
  }                                                                                                     \
  DEEPEP_VECTORISED void decode_over(Format, const uint8_t* m, int64_t n, float* v) {                   \
    decode_blocks<Format, false>(m, n, v);                                                              \
  }                                                                                                     \
  DEEPEP_VECTORISED void decode_onto(Format, const uint8_t* m, int64_t n, float* v) {                   \
    decode_blocks<Format, true>(m, n, v);                                                               \
  }
DEEPEP_LOOPS(E4M3)
DEEPEP_LOOPS(Half)
DEEPEP_LOOPS(Bfloat)
#undef DEEPEP_LOOPS

template <class Visit>
auto with_format(GradientFormat format, const Visit& visit) {
  switch (format) {
    case GradientFormat::fp8: return visit(E4M3{});
    case GradientFormat::fp16: return visit(Half{});
    default: return visit(Bfloat{});
  }
}

}  // namespace

int64_t message_bytes(GradientFormat format, int64_t count) {
  expect_at_least(0, "count", count);
  return with_format(format, [&](auto kind) { return layout::message_bytes<decltype(kind)>(count); });
}

void encode(GradientFormat format, const float* values, int64_t count, Rounding rounding, uint8_t* message) {
  with_format(format, [&](auto kind) {
    if (rounding.is_nearest) encode_nearest(kind, values, count, rounding, message);
    else encode_stochastic(kind, values, count, rounding, message);
  });
}

void decode(GradientFormat format, const uint8_t* message, int64_t count, bool is_added, float* values) {
  with_format(format, [&](auto kind) {
    if (is_added) decode_onto(kind, message, count, values);
    else decode_over(kind, message, count, values);
  });
}

DEEPEP_VECTORISED void block_exponents(const float* values, int64_t count, uint8_t* exponents) {
  for_each_block(count, [&](int64_t block, int64_t first, int64_t length) {
    exponents[block] = uint8_t(largest_magnitude(values + first, length) >> 23);
  });
}

DEEPEP_VECTORISED void encode_fixed(const float* values, int64_t count, const uint8_t* exponents,
                                    int32_t headroom, int32_t* integers) {
  for_each_block(count, [&](int64_t block, int64_t first, int64_t length) {
    const FixedPoint fixed{exponents[block], headroom};
    if (fixed.exponent == kNotFinite) {
      std::memset(integers + first, 0, size_t(length) * sizeof(int32_t));
      return;
    }
    const float once = fixed.half_scale(), again = fixed.other_half_scale();
    for (int64_t i = first; i < first + length; ++i) integers[i] = nearest_integer(values[i] * once * again);
  });
}

DEEPEP_VECTORISED void decode_fixed(const int32_t* integers, int64_t count, const uint8_t* exponents,
                                    int32_t headroom, float divisor, float* values) {
  for_each_block(count, [&](int64_t block, int64_t first, int64_t length) {
    const FixedPoint fixed{exponents[block], headroom};
    const bool is_finite = fixed.exponent != kNotFinite;
    const float once = is_finite ? fixed.half_unit() : float_of(kFloatNan);
    const float again = is_finite ? fixed.other_half_unit() : 1;
    for (int64_t i = first; i < first + length; ++i) {
      values[i] = float(integers[i]) * once * again / divisor;
    }
  });
}

}  // namespace deepep::host
