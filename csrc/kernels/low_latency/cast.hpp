// A token's channels to its destinations: as they are, or cast to FP8 on the way. reference/formats.py says the
// same.
#pragma once

#include "kernels/low_latency/dispatch_call.hpp"

namespace deepep::kernels {

inline constexpr int kLanesOfGroup = 8;  // a lane casts 16 channels, so 8 lanes share a scale

/// Where a token goes. Lane r: the address of its message at rank r.
struct Destinations {
  uint32_t ranks;  // as bits
  uint64_t message;
};

/// A unit of a row, on its way through a warp's registers: 16 channels a lane, side by side where they are
/// cast, else in two pieces that lie a warp apart.
struct RowUnit {
  dev::Vec16 first;
  dev::Vec16 second;
};

[[nodiscard]] DEEPEP_DEVICE int num_units(int hidden) { return (hidden + kUnit - 1) / kUnit; }

/// Unit `unit` of token t's row.
[[nodiscard]] DEEPEP_DEVICE RowUnit load_unit(const LowLatencyDispatchArgs& args, int t, int unit) {
  using namespace dev;
  const int pieces = args.hidden / 8;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.x) + int64_t{t} * pieces;
  const int first = 2 * kWarpSize * unit + (args.casts ? 2 * lane() : lane());
  const int second = first + (args.casts ? 1 : kWarpSize);
  RowUnit row = {};
  if (first < pieces) row.first = load_once(from + first);
  if (second < pieces) row.second = load_once(from + second);
  return row;
}

/// As it is. One warp.
DEEPEP_DEVICE void copy_unit(const LowLatencyDispatchArgs& args, const layout::LowLatencyMessage& message,
                             const Destinations& to, int unit, const RowUnit& row) {
  using namespace dev;
  const int left = args.hidden / 8 - 2 * kWarpSize * unit - lane();  // pieces from this lane's first on
#pragma unroll 1
  for (uint32_t ranks = to.ranks; ranks != 0; ranks &= ranks - 1) {
    std::byte* there = reinterpret_cast<std::byte*>(shuffle(to.message, lowest_bit(ranks)));
    Vec16* piece = reinterpret_cast<Vec16*>(there + message.row()) + 2 * kWarpSize * unit + lane();
    if (left > 0) store_streaming(piece, row.first);
    if (left > kWarpSize) store_streaming(piece + kWarpSize, row.second);
  }
}

/// What a group's channels are multiplied by, and what restores them. Every step is one rounding.
struct Fp8Scale {
  float scale;
  float inverse;
};

[[nodiscard]] DEEPEP_DEVICE Fp8Scale scale_of_group(uint32_t largest, bool to_power_of_two) {
  using namespace dev;
  const float magnitude = float_of_bits(largest);
  const float amax = magnitude < 1e-4f ? 1e-4f : magnitude;
  const float inverse = div_rounded(amax, 448.0f);
  if (!to_power_of_two) return {div_rounded(448.0f, amax), inverse};
  const uint32_t bits = bits_of(inverse);
  const float power = float_of_bits(((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u)) << 23);
  return {div_rounded(1.0f, power), power};
}

/// Four channels.
[[nodiscard]] DEEPEP_DEVICE uint32_t cast_pair(uint32_t first, uint32_t second, float scale) {
  using namespace dev;
  return pack_e4m3(mul_rounded(bf16_low(first), scale), mul_rounded(bf16_high(first), scale),
                   mul_rounded(bf16_low(second), scale), mul_rounded(bf16_high(second), scale));
}

/// Whole groups, with their scales. One warp.
DEEPEP_DEVICE void cast_unit(const LowLatencyDispatchArgs& args, const layout::LowLatencyMessage& message,
                             const Destinations& to, int unit, const RowUnit& row) {
  using namespace dev;
  const int piece = kWarpSize * unit + lane();
  const bool is_mine = piece < args.hidden / 16;
  uint32_t largest = 0;  // two bf16
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = larger_bf16(larger_bf16(largest, row.first.w[i]), row.second.w[i]);
#pragma unroll
  for (int distance = 1; distance < kLanesOfGroup; distance *= 2)
    largest = larger_bf16(largest, shuffle(largest, lane() ^ distance));
  largest = larger_bf16(largest, largest >> 16) << 16;  // as a float32
  const Fp8Scale scale = scale_of_group(largest, args.rounds_scales);
  const Vec16 cast{{cast_pair(row.first.w[0], row.first.w[1], scale.scale),
                    cast_pair(row.first.w[2], row.first.w[3], scale.scale),
                    cast_pair(row.second.w[0], row.second.w[1], scale.scale),
                    cast_pair(row.second.w[2], row.second.w[3], scale.scale)}};
#pragma unroll 1
  for (uint32_t ranks = to.ranks; ranks != 0; ranks &= ranks - 1) {
    std::byte* there = reinterpret_cast<std::byte*>(shuffle(to.message, lowest_bit(ranks)));
    if (!is_mine) continue;
    store_streaming(reinterpret_cast<Vec16*>(there + message.row()) + piece, cast);
    if (piece % kLanesOfGroup == 0)
      store(reinterpret_cast<uint32_t*>(there + message.scales()) + piece / kLanesOfGroup,
            bits_of(scale.inverse));
  }
}

}  // namespace deepep::kernels
