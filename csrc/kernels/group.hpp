// What every kernel does alike: find a peer's memory, report a fault, leave in order.
#pragma once

#include "device/device.hpp"
#include "kernels/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE bool is_live(const Group& g, int rank) { return (g.live >> rank) & 1u; }

template <class T>
[[nodiscard]] DEEPEP_DEVICE T* at(const Group& g, int rank, int64_t offset) {
  return reinterpret_cast<T*>(g.heap[rank] + offset);
}

/// Notes a wait that ended without what it waited for. The first note's numbers stay; ranks add up.
DEEPEP_DEVICE void note_fault(const Group& g, Phase phase, uint32_t missing, uint32_t expected, uint32_t seen) {
  using namespace dev;
  if (fetch_or<relaxed, gpu_scope>(&g.state->phase, static_cast<uint32_t>(phase)) == 0) {
    store<relaxed, gpu_scope>(&g.state->expected, expected);
    store<relaxed, gpu_scope>(&g.state->seen, seen);
  }
  fetch_or<relaxed, gpu_scope>(&g.state->missing, missing);
}

/// The end of every kernel, for every block: the last one to come advances the epoch (so that a replayed
/// graph counts on) and hands a fault to the host. Called by all threads, faulted or not.
DEEPEP_DEVICE void leave(const Group& g, Operation operation, uint32_t* epoch) {
  using namespace dev;
  sync_block();
  if (thread() != 0) return;
  LocalState* state = g.state;
  const uint32_t before = fetch_add<acq_rel, gpu_scope>(&state->blocks_left, 1u);
  if (before + 1 != static_cast<uint32_t>(num_blocks())) return;
  store(&state->blocks_left, 0u);
  store(epoch, load(epoch) + 1);
  const uint32_t phase = load<relaxed, gpu_scope>(&state->phase);
  if (phase == 0) return;
  const uint32_t serial = load(&state->serial) + 1;
  store(&state->serial, serial);
  FaultRecord* record = g.fault;
  store(&record->operation, static_cast<uint32_t>(operation));
  store(&record->phase, phase);
  store(&record->missing, load<relaxed, gpu_scope>(&state->missing));
  store(&record->expected, load<relaxed, gpu_scope>(&state->expected));
  store(&record->seen, load<relaxed, gpu_scope>(&state->seen));
  store<release, sys_scope>(&record->serial, serial);
  store<relaxed, gpu_scope>(&state->phase, 0u);
  store<relaxed, gpu_scope>(&state->missing, 0u);
}

}  // namespace deepep::kernels
