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

/// Hands the faults noted by this kernel's blocks, if any, to the host. One thread.
DEEPEP_DEVICE void hand_over_fault(const Group& g, Operation operation) {
  using namespace dev;
  LocalState* state = g.state;
  const uint32_t phase = load<relaxed, gpu_scope>(&state->phase);
  if (phase == 0) return;  // stopped for a reason that the host learns with the counts
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

/// In the blocks' arrival counter: how many came, and above it how many of those had failed.
inline constexpr uint32_t kFailedBlock = 1u << 16;

/// The end of a kernel, for all blocks: their work, and their faults, come before their arrival at block 0. Block 0,
/// when all have come, advances the epoch (on the device, so that a replayed graph counts on) and hands a fault to the
/// host. `failed` is the block's shared word that is not 0 after a fault and block 0's last warp
/// does the waiting while the others may still wait for peers. Whole block.
DEEPEP_DEVICE void close_kernel(const Group& g, Operation operation, dev::SharedArray<uint32_t> failed, uint32_t* epoch,
                                uint32_t value) {
  using namespace dev;
  if (block() != 0) {
    sync_block();
    if (thread() == 0)
      fetch_add<release, gpu_scope>(&g.state->blocks_left, failed.get(0) != 0 ? 1u + kFailedBlock : 1u);
    return;
  }
  if (thread() == num_threads() - 1) {
    const uint32_t others = static_cast<uint32_t>(num_blocks()) - 1;
    // The other blocks' waits have deadlines of their own; a second one covers a block that found no SM.
    const Deadline deadline = Deadline::in(2 * g.timeout_ns);
    uint32_t arrived = 0;
    if (!wait_masked<acquire, gpu_scope>(&g.state->blocks_left, kFailedBlock - 1, others, deadline, arrived)) {
      note_fault(g, Phase::kBlocks, 0, others, arrived & (kFailedBlock - 1));
      failed.bit_or(0, static_cast<uint32_t>(Phase::kBlocks));
    }
    if (arrived >= kFailedBlock) failed.bit_or(0, kFailedBlock);
    store(&g.state->blocks_left, 0u);
    store(epoch, value);
  }
  sync_block();
  if (thread() == 0 && failed.get(0) != 0) hand_over_fault(g, operation);
}

}  // namespace deepep::kernels
