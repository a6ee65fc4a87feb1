// A barrier of all live ranks on the device, with a deadline: one word a rank, carrying the epoch. One block.
//
// Phases:
//   start           reads the epoch
//   grant_credit    peers may write to this rank's combine staging
//   signal_arrival  this rank's word at every live rank
//   wait_arrivals   those of all live ranks here
//   advance_epoch
//   finish          looks for a rank that did not come
//   report_fault    one thread, if one did not
#pragma once

#include "kernels/common/fault.hpp"

namespace deepep::kernels {

struct BarrierArgs {
  Group group;
};

struct BarrierCall {
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
};

/// A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE BarrierCall start(const BarrierArgs& args) {
  using namespace dev;
  const Group& g = args.group;
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->barrier_epoch);
  SharedArray<uint32_t> failed(0);
  if (thread() == 0) failed.set(0, 0);
  return {g, epoch, deadline};
}

DEEPEP_DEVICE void grant_credit(const BarrierCall& call) {
  grant_credit(call.g, dev::load_once(&call.g.state->combine_epoch));
}

DEEPEP_DEVICE void signal_arrival(const BarrierCall& call) {
  using namespace dev;
  const Group& g = call.g;
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (is_live(g, peer))
      store<release, sys_scope>(at<uint32_t>(g, peer, g.control.arrived(g.rank)), call.epoch);
}

DEEPEP_DEVICE void wait_arrivals(const BarrierCall& call) {
  using namespace dev;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(0);
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads()) {
    if (!is_live(g, peer)) continue;
    const uint32_t* arrived = at<uint32_t>(g, g.rank, g.control.arrived(peer));
    // A peer may have gone through and entered the next barrier already.
    if (wait_reached<acquire, sys_scope>(arrived, call.epoch, call.deadline)) continue;
    note_fault(g, Phase::kArrival, 1u << peer, call.epoch, load<relaxed, sys_scope>(arrived));
    failed.bit_or(0, 1u);
  }
}

DEEPEP_DEVICE void advance_epoch(const BarrierCall& call) {
  if (dev::thread() == 0) advance_epoch(call.g, &call.g.state->barrier_epoch, call.epoch);
}

/// True on one thread, if a rank did not arrive in time.
[[nodiscard]] DEEPEP_DEVICE bool finish(const BarrierCall&) {
  using namespace dev;
  SharedArray<uint32_t> failed(0);
  sync_block();
  return thread() == 0 && failed.get(0) != 0;
}

DEEPEP_KERNEL(barrier_kernel, BarrierArgs, kThreads) {
  using namespace dev;
  const BarrierCall call = start(args);
  sync_block();
  grant_credit(call);
  signal_arrival(call);
  wait_arrivals(call);
  advance_epoch(call);
  if (finish(call)) report_fault(call.g, Operation::kBarrier);
}

}  // namespace deepep::kernels
