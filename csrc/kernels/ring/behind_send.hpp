// Behind the copy of a tensor into a neighbour's slot: signals that it is there.
//
// Phases:
//   start        finds its words
//   post_tensor  its kind, and the slot's next epoch behind that
//
// The copy engine's writes come first: the copy has ended before this kernel begins, which is the stream's
// order, and the release at system scope carries all that came before it.
#pragma once

#include "kernels/ring/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void post_tensor(const RingCall& call) {
  using namespace dev;
  const layout::RingSlots& slots = call.args.slots;
  if (thread() != 0 || load_once(call.here<uint32_t>(slots.sends_broken(call.way))) != 0) return;
  auto* sent = call.here<uint32_t>(slots.sent(call.way, call.args.slot));
  const uint32_t epoch = next_epoch(sent);
  store(sent, epoch);
  store(call.there<uint64_t>(slots.kind(call.peers_way, call.args.slot)), call.args.kind);
  store<release, sys_scope>(call.there<uint32_t>(slots.filled(call.peers_way, call.args.slot)), epoch);
}

DEEPEP_KERNEL(ring_behind_send_kernel, RingArgs, kRingThreads) {
  const RingCall call = start(args);
  post_tensor(call);
}

}  // namespace deepep::kernels
