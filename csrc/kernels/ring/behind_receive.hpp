// Behind the copy of a tensor out of a slot: gives the slot back to the neighbour.
//
// Phases:
//   start      finds its words
//   free_slot  unless the neighbour gave up waiting for one, and may have written over what was copied
//
// The copy has read the slot before this kernel begins, so that no write can reach those reads any more and the
// word needs no order. A neighbour that gives up says so before it writes into a slot. A copy that met what it
// wrote is followed by a look that finds the word: an atomic one, which reads what was written last.
#pragma once

#include "kernels/ring/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void free_slot(const RingCall& call) {
  using namespace dev;
  const layout::RingSlots& slots = call.args.slots;
  auto* broken = call.here<uint32_t>(slots.receives_broken(call.way));
  if (thread() != 0 || load(broken) != 0) return;
  auto* taken = call.here<uint32_t>(slots.taken(call.way, call.args.slot));
  const uint32_t epoch = next_epoch(taken);
  if (fetch_or<relaxed, sys_scope>(call.here<uint32_t>(slots.overwritten(call.way)), 0u) != 0) {
    store(broken, 1u);
    return give_up(call, Operation::kRingReceive, Phase::kOverwritten, 1, 0);
  }
  store(taken, epoch);
  store<relaxed, sys_scope>(call.there<uint32_t>(slots.freed(call.peers_way, call.args.slot)), epoch);
}

DEEPEP_KERNEL(ring_behind_receive_kernel, RingArgs, kRingThreads) {
  const RingCall call = start(args);
  free_slot(call);
}

}  // namespace deepep::kernels
