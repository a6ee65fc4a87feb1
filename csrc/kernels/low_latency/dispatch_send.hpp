// The send half of a low-latency dispatch, in a launch of its own.
//
// Phases:
//   start            reads the epoch
//   advance_epoch    each block has read it; the last one advances it
//   count_rows       rows of each expert and messages for each rank, of the tokens before the block's
//   post_words       block 0: to each rank, its counts and what must be the same everywhere
//   push_messages    every token to the ranks of its experts, once each, cast on the way
//   signal_messages  a flag for each, behind the block's rows
//
// Who waits for whom: nobody.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_dispatch_send_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const LowLatencyDispatchCall call = start(args);
  sync_block();
  advance_epoch(call);
  count_rows(call);
  post_words(call);
  push_messages(call);
  signal_messages(call);
}

}  // namespace deepep::kernels
