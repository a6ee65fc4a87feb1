// A plain contiguous copy through registers, by a given number of SMs: a floor that dispatch and combine are
// measured against. bulk_copy.hpp is another.
//
// Phases:
//   copy_pieces  16 bytes a lane at a time, several in flight
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

struct CopyArgs {
  const std::byte* from;
  std::byte* to;
  int64_t bytes;  // a multiple of 16
};

inline constexpr int kCopyUnroll = 8;  // 16-byte accesses a lane has in flight

DEEPEP_DEVICE void copy_pieces(const CopyArgs& args) {
  using namespace dev;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.from);
  Vec16* to = reinterpret_cast<Vec16*>(args.to);
  const int64_t count = args.bytes / 16;
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_threads();
  const int64_t own = static_cast<int64_t>(block()) * num_threads() + thread();
  for (int64_t first = own; first < count; first += step * kCopyUnroll) {
    Vec16 v[kCopyUnroll];
#pragma unroll
    for (int u = 0; u < kCopyUnroll; ++u)
      if (first + u * step < count) v[u] = load_once(from + first + u * step);
#pragma unroll
    for (int u = 0; u < kCopyUnroll; ++u)
      if (first + u * step < count) store_streaming(to + first + u * step, v[u]);
  }
}

DEEPEP_KERNEL(copy_kernel, CopyArgs, kThreads) { copy_pieces(args); }

}  // namespace deepep::kernels
