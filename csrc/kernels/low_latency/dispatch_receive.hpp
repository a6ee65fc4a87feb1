// The receive half of a low-latency dispatch, in a launch of its own: the hook.
//
// Phases:
//   start_receive     the epoch of its send
//   receive_messages  each message, as it comes, to the rows of its experts; this rank's own first. Before that
//                     every block waits for the words of all live ranks, which fix where every row goes
//   finish            looks for what went wrong
//   report_fault      one thread, if something did
//
// Who waits for whom: every block for every live rank's send half, this rank's own included, which has ended.
#pragma once

#include "kernels/low_latency/dispatch_spread.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_dispatch_receive_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  LowLatencyDispatchCall call = start_receive(args, watching);
  sync_block();
  receive_messages(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
