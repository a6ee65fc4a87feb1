// A barrier of all live ranks on the device, with a deadline: one word a rank, carrying the epoch.
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

struct BarrierArgs {
  Group group;
};

DEEPEP_KERNEL(barrier_kernel, BarrierArgs, kThreads) {
  using namespace dev;
  const Group& g = args.group;
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->barrier_epoch);
  SharedArray<uint32_t> failed(0);
  if (thread() == 0) failed.set(0, 0);
  sync_block();
  lend_staging(g, load_once(&g.state->combine_epoch));
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (is_live(g, peer)) store<release, sys_scope>(at<uint32_t>(g, peer, g.control.arrived(g.rank)), epoch);
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads()) {
    if (!is_live(g, peer)) continue;
    const uint32_t* arrived = at<uint32_t>(g, g.rank, g.control.arrived(peer));
    // A peer may have gone through and entered the next barrier already.
    if (wait_reached<acquire, sys_scope>(arrived, epoch, deadline)) continue;
    note_fault(g, Phase::kArrival, 1u << peer, epoch, load<relaxed, sys_scope>(arrived));
    failed.bit_or(0, 1u);
  }
  if (thread() == 0) have_read_epoch(g, &g.state->barrier_epoch, epoch);
  sync_block();
  if (thread() == 0 && failed.get(0) != 0) hand_over_faults(g, Operation::kBarrier);
}

}  // namespace deepep::kernels
