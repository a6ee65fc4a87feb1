// How long kernels wait for each of the other ranks, where somebody measures that: nanoseconds in this rank's
// own memory, added up over launches. A sum has one thread of a launch that adds to it, and launches of a rank
// come one after the other.
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

/// Lane r adds to sums[r] how long it takes until `came()`, if it is `waiting`. One warp, whose lanes look
/// together: those that left a loop of their own would wait behind it for the others, and read the clock when
/// the last one's word had come. What has not come by the deadline is left out. It orders nothing: whoever
/// needs what comes waits for it afterwards.
template <class Came>
DEEPEP_DEVICE void measure_wait(int64_t* sums, bool waiting, dev::Deadline deadline, const Came& came) {
  using namespace dev;
  const uint64_t begin = clock_ns();
#pragma unroll 1
  while (ballot(waiting) != 0) {
    if (waiting && came()) {
      store(sums + lane(), load(sums + lane()) + static_cast<int64_t>(clock_ns() - begin));
      waiting = false;
    }
    if (ballot(deadline.passed()) != 0) return;
    pause();
  }
}

/// The throughput operations' sums of one kind, [R].
[[nodiscard]] DEEPEP_DEVICE int64_t* sums_of(const Group& g, Waited kind) {
  return g.waits + static_cast<int>(kind) * g.num_ranks;
}

/// True on lanes that have another rank to wait for, by their number.
[[nodiscard]] DEEPEP_DEVICE bool has_peer(const Group& g) {
  const int peer = dev::lane();
  return peer < g.num_ranks && peer != g.rank && is_live(g, peer);
}

}  // namespace deepep::kernels
