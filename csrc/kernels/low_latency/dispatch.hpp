// A low-latency dispatch in one launch.
//
// Phases:
//   read_before       the epoch of the call before, and who is masked
//   first_entries     asks for what is counted first
//   first_outgoing    asks for what is sent first
//   start             this call's epoch
//   advance_epoch     each block has read it; the last one advances it
//   first_header      what can be said of a token before rows are counted
//   push_rows         every token's channels to the ranks of its experts, once each, cast on the way
//   count_rows        rows of each expert, of the tokens before the block's
//   post_words        block 0: to each rank, which tokens come, how many rows, and what all must pass alike
//   write_headers     where each message's rows go
//   signal_messages   the last warp: a flag for each that goes to another rank, behind all that the block
//                     stored
//   keep_hash         block 0: of the top-k indices, for the combine
//   receive_messages  each message, as it comes, to the rows of its experts; this rank's own first. Before that
//                     every block waits for the words of all live ranks, which fix where every row goes
//   finish            looks for what went wrong
//   report_fault      one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, this rank's own included, and for the blocks
// of others that push what it spreads. So all blocks must be resident together.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"
#include "kernels/low_latency/dispatch_spread.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_RECORDED_KERNEL(low_latency_dispatch_kernel, LowLatencyDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const Before before = read_before(args, watching);
  const Entries entries = first_entries(args);
  const Outgoing first = first_outgoing(args);
  LowLatencyDispatchCall call = start(args, before, watching, lines);
  advance_epoch(call);
  const HeaderDraft draft = first_header(args);
  push_rows(call, first);
  count_rows(call, entries);
  post_words(call);
  write_headers(call, draft);
  signal_messages(call);
  keep_hash(call);
  // Words of others lie where the counts have been: nobody reads those behind the barrier of signal_messages.
  receive_messages(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
