// Sums of rows by one warp, in fp32, in the order of the lanes that hold their addresses, with one rounding:
// the same bits whoever sums. Both halves of a combine: weighted on the expert's rank, as they are at the
// token's owner.
#pragma once

#include "kernels/low_latency/common.hpp"

namespace deepep::kernels {

inline constexpr int kSumUnroll = 2;  // 16-byte accesses of a row that a lane has in flight
inline constexpr int kSumRows = 4;    // rows

/// Rows to be summed. Lane i: the i-th one's address, and what it is multiplied by.
struct SumRows {
  uint32_t rows;  // as bits
  uint64_t address;
  float weight;
};

/// Adds eight channels. A product is rounded before it is added.
template <bool kWeighted>
DEEPEP_DEVICE void add_channels(float (&sum)[8], const dev::Vec16& v, float weight) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float channel = i % 2 == 0 ? dev::bf16_low(v.w[i / 2]) : dev::bf16_high(v.w[i / 2]);
    sum[i] = dev::add_rounded(sum[i], kWeighted ? dev::mul_rounded(channel, weight) : channel);
  }
}

/// A lane's sums: of eight channels each, a warp's width apart.
struct LaneSums {
  float of[kSumUnroll][8];
};

/// Sums start from -0.0, which adds nothing, not even a sign; no row gives +0.0.
[[nodiscard]] DEEPEP_DEVICE LaneSums begin_sums(uint32_t rows) {
  const float nothing = rows == 0 ? 0.0f : -0.0f;
  LaneSums sum;
#pragma unroll
  for (int u = 0; u < kSumUnroll; ++u)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum.of[u][i] = nothing;
  return sum;
}

/// The sums of a lane's pieces of the rows, from piece `begin` on: those u with u * kWarpSize < left.
template <bool kWeighted>
[[nodiscard]] DEEPEP_DEVICE LaneSums sum_pieces(const SumRows& given, int begin, int left) {
  using namespace dev;
  LaneSums sum = begin_sums(given.rows);
#pragma unroll 1
  for (uint32_t rows = given.rows; rows != 0;) {
    Vec16 v[kSumRows][kSumUnroll] = {};
    float weight[kSumRows] = {};
    int count = 0;
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      if (rows == 0) continue;
      const int row = lowest_bit(rows);
      rows &= rows - 1;
      ++count;
      const Vec16* source = reinterpret_cast<const Vec16*>(shuffle(given.address, row)) + begin;
      if (kWeighted) weight[i] = shuffle(given.weight, row);
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u)
        if (u * kWarpSize < left) v[i][u] = load_streaming(source + u * kWarpSize);
    }
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      if (i >= count) continue;
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) add_channels<kWeighted>(sum.of[u], v[i][u], weight[i]);
    }
  }
  return sum;
}

[[nodiscard]] DEEPEP_DEVICE dev::Vec16 round_channels(const float (&sum)[8]) {
  dev::Vec16 rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.w[i] = dev::pack_bf16(sum[2 * i], sum[2 * i + 1]);
  return rounded;
}

/// The 16-byte pieces [from, end) of the sum, to `out`.
template <bool kWeighted>
DEEPEP_DEVICE void sum_rows(dev::Vec16* out, const SumRows& given, int from, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane(); begin < end + lane(); begin += kSumUnroll * kWarpSize) {
    const int left = end - begin;
    const LaneSums sum = sum_pieces<kWeighted>(given, begin, left);
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(out + begin + u * kWarpSize, round_channels(sum.of[u]));
  }
}

}  // namespace deepep::kernels
