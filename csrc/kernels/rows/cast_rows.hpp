// Rows to FP8, with a scale per 128 channels. deepep/formats.py (fp8_cast) says the same.
//
// Phases:
//   cast_rows  a thread has 8 channels, 16 neighbouring lanes a group; every step is one rounding
#pragma once

#include "device/device.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::kernels {

inline constexpr int kCastChannels = 8;  // of a thread: 16 bytes

/// Eight channels as e4m3, the first in the lowest byte.
[[nodiscard]] DEEPEP_DEVICE uint64_t cast_piece(const dev::Vec16& x, float factor) {
  using namespace dev;
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    words[i] = pack_e4m3(
        mul_rounded(bf16_low(x.w[2 * i]), factor), mul_rounded(bf16_high(x.w[2 * i]), factor),
        mul_rounded(bf16_low(x.w[2 * i + 1]), factor), mul_rounded(bf16_high(x.w[2 * i + 1]), factor));
  return uint64_t{words[1]} << 32 | words[0];
}

/// The largest magnitude of the group that the lane is of, as a float32's bits. All lanes of the warp.
[[nodiscard]] DEEPEP_DEVICE uint32_t largest_of_group(const dev::Vec16& x) {
  using namespace dev;
  uint32_t largest = 0;  // two bf16
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = larger_bf16(largest, x.w[i]);
#pragma unroll
  for (int distance = 1; distance < kScaleGroup / kCastChannels; distance *= 2)
    largest = larger_bf16(largest, shuffle(largest, lane() ^ distance));
  return larger_bf16(largest, largest >> 16) << 16;
}

DEEPEP_DEVICE void cast_rows(const CastRowsArgs& args) {
  using namespace dev;
  const int64_t pieces = args.num_channels / kCastChannels;
  const int64_t step = int64_t{num_blocks()} * num_threads();
  // Whole warps, since lanes ask their neighbours. A group is all there or not at all.
  for (int64_t begin = int64_t{block()} * num_threads() + warp() * kWarpSize; begin < pieces; begin += step) {
    const int64_t piece = begin + lane();
    const bool has = piece < pieces;
    Vec16 x = {};
    if (has) x = load_once(reinterpret_cast<const Vec16*>(args.x) + piece);
    const float magnitude = float_of_bits(largest_of_group(x));
    const float amax = magnitude < 1e-4f ? 1e-4f : magnitude;
    if (!has) continue;
    store(reinterpret_cast<uint64_t*>(args.values) + piece, cast_piece(x, div_rounded(448.0f, amax)));
    if (piece % (kScaleGroup / kCastChannels) == 0)
      store(args.scales + piece / (kScaleGroup / kCastChannels), div_rounded(amax, 448.0f));
  }
}

DEEPEP_KERNEL(cast_rows_kernel, CastRowsArgs, kRowThreads) { cast_rows(args); }

}  // namespace deepep::kernels
