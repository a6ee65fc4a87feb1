// A low-latency dispatch in one launch.
//
// Phases:
//   last_epoch       of the call before
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
//   wait_words       every block, for the words of all live ranks: they fix where every row goes
//   hand_out         block 0: counts and ranges to the user
//   spread_messages  each message, as it comes, to the rows of its experts; this rank's own first
//   mark_rest        rows of the outputs that nothing came for
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, this rank's own included, and for the blocks
// of others that push what it spreads. So all blocks must be resident together.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"
#include "kernels/low_latency/dispatch_spread.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_dispatch_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const uint32_t last = last_epoch(args);
  const Entries entries = first_entries(args);
  const Outgoing first = first_outgoing(args);
  const LowLatencyDispatchCall call = start(args, last);
  advance_epoch(call);
  const HeaderDraft draft = first_header(args);
  push_rows(call, first);
  count_rows(call, entries);
  post_words(call);
  write_headers(call, draft);
  signal_messages(call);
  keep_hash(call);
  // Words of others lie where the counts have been: nobody reads those behind the barrier of signal_messages.
  if (wait_words(call)) {
    hand_out(call);
    spread_messages(call);
    mark_rest(call);
  }
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
