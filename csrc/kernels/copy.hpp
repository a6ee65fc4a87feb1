// A plain contiguous copy by a given number of SMs: the floor that dispatch and combine are measured against.
#pragma once

#include "kernels/group.hpp"

namespace deepep::kernels {

struct CopyArgs {
  const std::byte* from;
  std::byte* to;
  int64_t bytes;  // a multiple of 16
};

DEEPEP_KERNEL(copy_kernel, CopyArgs, kThreads) {
  using namespace dev;
  constexpr int kUnroll = 8;
  const Vec16* from = reinterpret_cast<const Vec16*>(args.from);
  Vec16* to = reinterpret_cast<Vec16*>(args.to);
  const int64_t count = args.bytes / 16;
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_threads();
  const int64_t own = static_cast<int64_t>(block()) * num_threads() + thread();
  for (int64_t first = own; first < count; first += step * kUnroll) {
    Vec16 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * step < count) v[u] = load_once(from + first + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * step < count) store_streaming(to + first + u * step, v[u]);
  }
}

}  // namespace deepep::kernels
