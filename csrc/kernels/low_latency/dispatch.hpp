// A low-latency dispatch in one launch.
//
// Phases:
//   start            reads the epoch
//   advance_epoch    each block has read it; the last one advances it
//   count_rows       rows of each expert and messages for each rank, of the tokens before the block's
//   post_words       block 0: to each rank, its counts and what must be the same everywhere
//   push_messages    every token to the ranks of its experts, once each, cast on the way
//   signal_messages  a flag for each, behind the block's rows
//   wait_words       every block, for the words of all live ranks: they fix where every row goes
//   list_rows        counts and ranges to the user, and where each source's rows begin
//   spread_messages  each message, as it comes, to the rows of its experts
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, and for the blocks that push what it spreads,
// this rank's own included. So all blocks must be resident together.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"
#include "kernels/low_latency/dispatch_spread.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_dispatch_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const LowLatencyDispatchCall call = start(args);
  sync_block();
  advance_epoch(call);
  count_rows(call);
  post_words(call);
  push_messages(call);
  signal_messages(call);
  // Both halves use the same shared memory: nobody reads the counts behind the barrier of signal_messages.
  if (wait_words(call)) {
    list_rows(call);
    spread_messages(call);
  }
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
