// Before the copy of a tensor into a neighbour's slot: waits until the one that was there has been taken out.
//
// Phases:
//   start        finds its words
//   wait_credit  the neighbour's word, for which it copies out and then writes here
//
// The copy behind this kernel is the copy engine's, which nothing on the device can hold back. So who gives up
// says so in the neighbour's memory first: it has not taken out the tensor in that slot, and must know that
// what it finds there is another (behind_receive.hpp). Nothing of this way is signalled any more.
#pragma once

#include "kernels/ring/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void wait_credit(const RingCall& call) {
  using namespace dev;
  const Group& g = call.args.group;
  const layout::RingSlots& slots = call.args.slots;
  auto* broken = call.here<uint32_t>(slots.sends_broken(call.way));
  if (thread() != 0) return;
  const uint32_t sent = load_once(call.here<uint32_t>(slots.sent(call.way, call.args.slot)));
  const auto* freed = call.here<uint32_t>(slots.freed(call.way, call.args.slot));
  // What broke a way may have been noted behind another fault that the host had not taken yet: said again.
  const bool is_broken = load(broken) != 0;
  if (!is_broken && wait_equal<acquire, sys_scope>(freed, sent, Deadline::in(g.timeout_ns))) return;
  store(broken, 1u);
  // The end of this kernel puts it before the copy.
  store<relaxed, sys_scope>(call.there<uint32_t>(slots.overwritten(call.peers_way)), 1u);
  give_up(call, Operation::kRingSend, Phase::kCredit, 1, 0);
}

DEEPEP_KERNEL(ring_before_send_kernel, RingArgs, kRingThreads) {
  const RingCall call = start(args);
  wait_credit(call);
}

}  // namespace deepep::kernels
