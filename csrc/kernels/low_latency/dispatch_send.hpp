// The send half of a low-latency dispatch, in a launch of its own.
//
// Phases:
//   read_before      the epoch of the call before, and who is masked
//   first_entries    asks for what is counted first
//   first_outgoing   asks for what is sent first
//   start            this call's epoch
//   advance_epoch    each block has read it; the last one advances it
//   first_header     what can be said of a token before rows are counted
//   push_rows        every token's channels to the ranks of its experts, once each, cast on the way
//   count_rows       rows of each expert, of the tokens before the block's
//   post_words       block 0: to each rank, which tokens come, how many rows, and what all must pass alike
//   write_headers    where each message's rows go
//   signal_messages  the last warp: a flag for each that goes to another rank, behind all that the block stored
//   keep_hash        block 0: of the top-k indices, for the combine
//
// Who waits for whom: nobody.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_dispatch_send_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const Before before = read_before(args, true);  // it has one form, for calls with masks, too
  const Entries entries = first_entries(args);
  const Outgoing first = first_outgoing(args);
  const LowLatencyDispatchCall call = start(args, before, false);
  advance_epoch(call);
  const HeaderDraft draft = first_header(args);
  push_rows(call, first);
  count_rows(call, entries);
  post_words(call);
  write_headers(call, draft);
  signal_messages(call);
  keep_hash(call);
}

}  // namespace deepep::kernels
