// The gradient codec over arrays (gradient_codec.hpp). For the CPU alone.
#pragma once

#include <cstdint>

namespace deepep::host {

enum class GradientFormat { fp8, fp16, bf16 };

/// Dice of stochastic rounding. `first_index`: of the message's first element in its tensor.
struct Rounding {
  bool is_nearest;
  uint32_t first_key, second_key, first_index;
};

/// Bytes of a message of `count` elements.
int64_t message_bytes(GradientFormat format, int64_t count);

/// values [count] -> message [message_bytes].
void encode(GradientFormat format, const float* values, int64_t count, Rounding rounding, uint8_t* message);

/// message -> values [count]; or added to them.
void decode(GradientFormat format, const uint8_t* message, int64_t count, bool is_added, float* values);

/// values [count] -> the largest exponent byte of each block.
void block_exponents(const float* values, int64_t count, uint8_t* exponents);

/// values [count] -> integers [count], by the exponents that all ranks have agreed on.
void encode_fixed(const float* values, int64_t count, const uint8_t* exponents, int32_t headroom,
                  int32_t* integers);

/// The inverse of sums of such integers: values [count], each divided by `divisor`.
void decode_fixed(const int32_t* integers, int64_t count, const uint8_t* exponents, int32_t headroom,
                  float divisor, float* values);

}  // namespace deepep::host
