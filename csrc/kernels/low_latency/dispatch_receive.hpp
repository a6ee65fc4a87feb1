// The receive half of a low-latency dispatch, in a launch of its own: the hook.
//
// Phases:
//   start_receive    the epoch of its send
//   wait_words       every block, for the words of all live ranks: they fix where every row goes
//   hand_out         block 0: counts and ranges to the user
//   spread_messages  each message, as it comes, to the rows of its experts; this rank's own first
//   mark_rest        rows of the outputs that nothing came for
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for every live rank's send half, this rank's own included, which has ended.
#pragma once

#include "kernels/low_latency/dispatch_spread.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_dispatch_receive_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const LowLatencyDispatchCall call = start_receive(args);
  sync_block();
  if (wait_words(call)) {
    hand_out(call);
    spread_messages(call);
    mark_rest(call);
  }
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
