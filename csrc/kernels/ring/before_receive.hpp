// Before the copy of a tensor out of a slot: waits until the neighbour has sent it.
//
// Phases:
//   start        finds its words
//   wait_tensor  the neighbour's signal; then compares the kind
//
// A tensor of another kind than the receiver's is lost: it is reported, and the slot goes back all the same.
#pragma once

#include "kernels/ring/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void wait_tensor(const RingCall& call) {
  using namespace dev;
  const RingArgs& args = call.args;
  const layout::RingSlots& slots = args.slots;
  auto* broken = call.here<uint32_t>(slots.receives_broken(call.way));
  if (thread() != 0) return;
  const uint32_t epoch = next_epoch(call.here<uint32_t>(slots.taken(call.way, args.slot)));
  const auto* filled = call.here<uint32_t>(slots.filled(call.way, args.slot));
  // What broke a way may have been noted behind another fault that the host had not taken yet: said again.
  const bool is_broken = load(broken) != 0;
  if (is_broken || !wait_equal<acquire, sys_scope>(filled, epoch, Deadline::in(args.group.timeout_ns))) {
    store(broken, 1u);
    return give_up(call, Operation::kRingReceive, Phase::kTensor, 1, 0);
  }
  const uint64_t kind = load(call.here<uint64_t>(slots.kind(call.way, args.slot)));
  if (kind != args.kind)
    give_up(call, Operation::kRingReceive, Phase::kDisagreement, ring_recorded(args.kind), ring_recorded(kind));
}

DEEPEP_KERNEL(ring_before_receive_kernel, RingArgs, kRingThreads) {
  const RingCall call = start(args);
  wait_tensor(call);
}

}  // namespace deepep::kernels
