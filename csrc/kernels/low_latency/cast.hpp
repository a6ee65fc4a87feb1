// A token's channels to its destinations: as they are, or cast to FP8 on the way. reference/formats.py says the
// same.
#pragma once

#include "kernels/low_latency/common.hpp"

namespace deepep::kernels {

inline constexpr int kSendUnroll = 4;    // 16-byte accesses a lane has in flight
inline constexpr int kLanesOfGroup = 8;  // a lane casts 16 channels, so 8 lanes share a scale

/// Where a token goes. Lane r: the address of its message at rank r.
struct Destinations {
  uint32_t ranks;  // as bits
  uint64_t message;
};

/// A part of a row of bf16. One warp.
DEEPEP_DEVICE void copy_channels(const LowLatencyDispatchArgs& args, const layout::LowLatencyMessage& message,
                                 const Destinations& to, int t, int part, int parts) {
  using namespace dev;
  const int pieces = args.hidden / 8;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.x) + int64_t{t} * pieces;
  const int end = pieces * (part + 1) / parts;
#pragma unroll 1
  for (int begin = pieces * part / parts + lane(); begin < end + lane(); begin += kSendUnroll * kWarpSize) {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 v[kSendUnroll] = {};
#pragma unroll
    for (int u = 0; u < kSendUnroll; ++u)
      if (u * kWarpSize < left) v[u] = load_once(from + begin + u * kWarpSize);
#pragma unroll 1
    for (uint32_t ranks = to.ranks; ranks != 0; ranks &= ranks - 1) {
      Vec16* row = reinterpret_cast<Vec16*>(shuffle(to.message, lowest_bit(ranks)) + message.row()) + begin;
#pragma unroll
      for (int u = 0; u < kSendUnroll; ++u)
        if (u * kWarpSize < left) store_streaming(row + u * kWarpSize, v[u]);
    }
  }
}

/// The largest magnitude of eight bf16 that is not NaN, as float32 bits.
[[nodiscard]] DEEPEP_DEVICE uint32_t largest_of(const dev::Vec16& v, uint32_t largest) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = (v.w[i] << 16) & 0x7fffffffu;
    const uint32_t high = v.w[i] & 0x7fff0000u;
    if (low <= 0x7f800000u && low > largest) largest = low;
    if (high <= 0x7f800000u && high > largest) largest = high;
  }
  return largest;
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

/// Eight channels.
[[nodiscard]] DEEPEP_DEVICE uint32_t cast_pair(uint32_t first, uint32_t second, float scale) {
  using namespace dev;
  return pack_e4m3(mul_rounded(bf16_low(first), scale), mul_rounded(bf16_high(first), scale),
                   mul_rounded(bf16_low(second), scale), mul_rounded(bf16_high(second), scale));
}

/// A part of a row, in whole groups, with their scales. One warp.
DEEPEP_DEVICE void cast_channels(const LowLatencyDispatchArgs& args, const layout::LowLatencyMessage& message,
                                 const Destinations& to, int t, int part, int parts) {
  using namespace dev;
  const int groups = args.hidden / layout::kFp8Group;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.x) + int64_t{t} * (args.hidden / 8);
  const int end = groups * (part + 1) / parts * kLanesOfGroup;
#pragma unroll 1
  for (int piece = groups * part / parts * kLanesOfGroup + lane(); piece < end + lane(); piece += kWarpSize) {
    const bool is_mine = piece < end;
    Vec16 first = {}, second = {};
    if (is_mine) {
      first = load_once(from + 2 * piece);
      second = load_once(from + 2 * piece + 1);
    }
    uint32_t largest = largest_of(second, largest_of(first, 0));
#pragma unroll
    for (int distance = 1; distance < kLanesOfGroup; distance *= 2) {
      const uint32_t other = shuffle(largest, lane() ^ distance);
      largest = other > largest ? other : largest;
    }
    const Fp8Scale scale = scale_of_group(largest, args.rounds_scales);
    const Vec16 cast{
        {cast_pair(first.w[0], first.w[1], scale.scale), cast_pair(first.w[2], first.w[3], scale.scale),
         cast_pair(second.w[0], second.w[1], scale.scale), cast_pair(second.w[2], second.w[3], scale.scale)}};
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
}

}  // namespace deepep::kernels
