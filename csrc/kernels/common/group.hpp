// What every kernel does alike: find a peer's memory, report a fault, leave in order.
#pragma once

#include "device/device.hpp"
#include "kernels/common/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE bool is_live(const Group& g, int rank) { return (g.live >> rank) & 1u; }

template <class T>
[[nodiscard]] DEEPEP_DEVICE T* at(const Group& g, int rank, int64_t offset) {
  return reinterpret_cast<T*>(g.heap[rank] + offset);
}

/// Whether ranks passed the same, in one word (FNV-1a over 32-bit values).
struct Digest {
  uint32_t value = 2166136261u;
  DEEPEP_HD void add(uint32_t part) { value = (value ^ part) * 16777619u; }
};

/// How a kernel starts, for every block: reads the number of this call. All threads. Never 0, which is what words hold
/// that nobody has written yet; nor 1 after 2^32 - 1, for what lies in two places in turn goes by the lowest bit.
[[nodiscard]] DEEPEP_DEVICE uint32_t next_epoch(const uint32_t* epoch) {
  const uint32_t last = dev::load(epoch);
  return last == 0xffffffffu ? 2 : last + 1;
}

/// Advances the epoch when all blocks have read it: on the device, so that a replayed graph counts on; and without a
/// wait, so that no block needs another one to be resident. One thread of every block, behind a block barrier that
/// follows the block's own reads.
DEEPEP_DEVICE void have_read_epoch(const Group& g, uint32_t* epoch, uint32_t value) {
  using namespace dev;
  const uint32_t before = fetch_add<acq_rel, gpu_scope>(&g.state->blocks_started, 1u);
  if (before + 1 != static_cast<uint32_t>(num_blocks())) return;
  store(&g.state->blocks_started, 0u);
  store(epoch, value);
}

/// Notes a wait that ended without what it waited for, before the block hands its faults over. The first note's
/// numbers stay; ranks add up.
DEEPEP_DEVICE void note_fault(const Group& g, Phase phase, uint32_t missing, uint32_t expected, uint32_t seen) {
  using namespace dev;
  if (fetch_or<relaxed, gpu_scope>(&g.state->phase, static_cast<uint32_t>(phase)) == 0) {
    store<relaxed, gpu_scope>(&g.state->expected, expected);
    store<relaxed, gpu_scope>(&g.state->seen, seen);
  }
  fetch_or<relaxed, gpu_scope>(&g.state->missing, missing);
}

/// Tells the peers that all this rank's combines up to `epoch` have read their staging. Said at the start of a
/// kernel, not at the end of the one that read: that one's end has waited for the reads, so that no write can reach
/// them any more and the word needs no order. Some of one block's threads.
DEEPEP_DEVICE void lend_staging(const Group& g, uint32_t epoch) {
  using namespace dev;
  DEEPEP_ROLLED
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (peer != g.rank && is_live(g, peer))
      store<relaxed, sys_scope>(at<uint32_t>(g, peer, g.control.staging_free(g.rank)), epoch);
}

/// How long a block that failed waits for the others' faults before it hands over: their deadlines are the same.
inline constexpr uint64_t kGatherNs = 1000000;

/// The end of a block in which a wait was in vain: the first such block hands what has been noted to the host. One
/// thread, behind a block barrier. The host clears the notes before it launches again.
DEEPEP_DEVICE void hand_over_faults(const Group& g, Operation operation) {
  using namespace dev;
  LocalState* state = g.state;
  // Nothing noted: the block stopped for a reason that the host learns with the counts.
  if (load<relaxed, gpu_scope>(&state->phase) == 0) return;
  if (fetch_add<acq_rel, gpu_scope>(&state->fault_reported, 1u) != 0) return;
  const Deadline gathered = Deadline::in(kGatherNs);
  while (!gathered.passed()) pause();
  FaultRecord* record = g.fault;
  store(&record->operation, static_cast<uint32_t>(operation));
  store(&record->phase, load<relaxed, gpu_scope>(&state->phase));
  store(&record->missing, load<relaxed, gpu_scope>(&state->missing));
  store(&record->expected, load<relaxed, gpu_scope>(&state->expected));
  store(&record->seen, load<relaxed, gpu_scope>(&state->seen));
  store<release, sys_scope>(&record->pending, 1u);
}

}  // namespace deepep::kernels
