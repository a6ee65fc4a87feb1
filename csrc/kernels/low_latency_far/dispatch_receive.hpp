// The receive half of a low-latency dispatch between domains, in a launch of its own.
//
// Phases:
//   start_receive     the epoch and the turn that the send has left
//   receive_messages  each message, as it comes, to the rows of its experts; this rank's own first. Before that
//                     every block waits for the words of all live ranks, with which those of other domains have
//                     put their messages
//   finish            looks for what went wrong
//   report_fault      one thread, if something did
//
// Who waits for whom: every block for the send of every live rank, this rank's own included, which has ended.
#pragma once

#include "kernels/low_latency_far/dispatch_call.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_far_dispatch_receive_kernel, FarDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  FarDispatchCall call = start_receive(args, watching);
  sync_block();
  receive_messages(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
