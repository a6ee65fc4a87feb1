// Four elements of a lane: read, written, encoded and decoded. A warp has a gradient block of 128.
#pragma once

#include "kernels/all_reduce/args.hpp"
#include "kernels/common/group.hpp"

namespace deepep::kernels {

inline constexpr int kLaneElements = 4;
static_assert(kLaneElements * dev::kWarpSize == layout::kGradientBlock);

/// Neighbouring elements of a lane, as float32.
struct Four {
  float v[kLaneElements];
};

/// The tensor's elements from `first` on; 0 past its end.
[[nodiscard]] DEEPEP_DEVICE Four load_elements(const AllReduceArgs& args, int64_t first) {
  using namespace dev;
  Four x = {};
  const bool whole = args.is_aligned && first + kLaneElements <= args.count;
  if (args.is_bf16) {
    const auto* from = reinterpret_cast<const uint16_t*>(args.tensor) + first;
    if (whole) {
      const uint64_t bits = load(reinterpret_cast<const uint64_t*>(from));
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        x.v[i] = layout::float_of(static_cast<uint32_t>(bits >> (16 * i)) << 16);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        if (first + i < args.count) x.v[i] = layout::float_of(uint32_t{load(from + i)} << 16);
    }
  } else {
    const auto* from = reinterpret_cast<const uint32_t*>(args.tensor) + first;
    if (whole) {
      const Vec16 bits = load(reinterpret_cast<const Vec16*>(from));
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) x.v[i] = layout::float_of(bits.w[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        if (first + i < args.count) x.v[i] = layout::float_of(load(from + i));
    }
  }
  return x;
}

/// Writes results over the tensor's elements from `first` on, to nearest where they are bfloat16.
DEEPEP_DEVICE void store_elements(const AllReduceArgs& args, int64_t first, const Four& x) {
  using namespace dev;
  const bool whole = args.is_aligned && first + kLaneElements <= args.count;
  if (args.is_bf16) {
    auto* to = reinterpret_cast<uint16_t*>(args.tensor) + first;
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      bits |= uint64_t{layout::bfloat_code<true>(x.v[i], 0)} << (16 * i);
    if (whole) return store(reinterpret_cast<uint64_t*>(to), bits);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      if (first + i < args.count) store(to + i, static_cast<uint16_t>(bits >> (16 * i)));
  } else {
    auto* to = reinterpret_cast<uint32_t*>(args.tensor) + first;
    Vec16 bits;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) bits.w[i] = layout::bits_of(x.v[i]);
    if (whole) return store(reinterpret_cast<Vec16*>(to), bits);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      if (first + i < args.count) store(to + i, bits.w[i]);
  }
}

/// The largest of the warp's values, on all lanes.
[[nodiscard]] DEEPEP_DEVICE uint32_t warp_largest(uint32_t value) {
  using namespace dev;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2)
    value = layout::max_of(value, shuffle(value, lane() ^ distance));
  return value;
}

[[nodiscard]] DEEPEP_DEVICE uint32_t largest_magnitude(const Four& x, uint32_t largest = 0) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    largest = layout::max_of(largest, layout::bits_of(x.v[i]) & layout::kMagnitude);
  return largest;
}

}  // namespace deepep::kernels
