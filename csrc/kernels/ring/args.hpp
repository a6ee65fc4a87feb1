// A tensor's way from a rank to its neighbour: the arguments of the four kernels around its two copies.
#pragma once

#include "kernels/common/args.hpp"
#include "layout/ring_slots.hpp"

namespace deepep::kernels {

/// One thread works.
inline constexpr int kRingThreads = 32;

struct RingArgs {
  Group group;
  layout::RingSlots slots;
  int peer;       // the neighbour
  int slot;       // of the way between the two
  uint64_t kind;  // dtype and bytes of the tensor, made by ring_kind
};

/// The kind of a tensor: what must be alike on both sides. dtype: a number below 256. bytes: below 2^48.
[[nodiscard]] DEEPEP_HD constexpr uint64_t ring_kind(uint64_t bytes, uint64_t dtype) {
  return (bytes << 8) | dtype;
}
/// Bytes in a fault's record, which has 32 bits for them: more are 2^32 - 1.
[[nodiscard]] DEEPEP_HD constexpr uint32_t ring_recorded(uint64_t kind) {
  return (kind >> 40) != 0 ? 0xffffffffu : static_cast<uint32_t>(kind >> 8);
}

}  // namespace deepep::kernels
