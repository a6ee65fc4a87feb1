// The sum of expanded rows: those of one received row's top-k entries, k ascending.
#pragma once

#include "device/device.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE float round_to_bf16(float value) {
  return dev::bf16_low(dev::pack_bf16(value, 0.0f));
}

/// Adds eight channels to their sums in fp32; weighted: the weight, a bf16, times channel, rounded to bf16.
template <bool kWeighted>
DEEPEP_DEVICE void add_piece(float (&sum)[8], const dev::Vec16& v, float weight) {
  using namespace dev;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = v.w[i];
    if constexpr (kWeighted)
      word = pack_bf16(mul_rounded(bf16_low(word), weight), mul_rounded(bf16_high(word), weight));
    sum[2 * i] = add_rounded(sum[2 * i], bf16_low(word));
    sum[2 * i + 1] = add_rounded(sum[2 * i + 1], bf16_high(word));
  }
}

/// Each sum rounded once.
[[nodiscard]] DEEPEP_DEVICE dev::Vec16 round_sums(const float (&sum)[8]) {
  dev::Vec16 packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.w[i] = dev::pack_bf16(sum[2 * i], sum[2 * i + 1]);
  return packed;
}

}  // namespace deepep::kernels
