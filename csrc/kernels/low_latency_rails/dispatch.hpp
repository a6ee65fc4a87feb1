// A low-latency dispatch between domains in two levels, in one launch.
//
// Phases:
//   read_before       the epoch of the call before, and who is masked
//   first_entries     asks for what is counted first
//   first_outgoing    asks for what is sent first
//   start             this call's epoch, and its turn among those that put
//   advance_epoch     each block has read it; the last one advances it
//   first_header      what can be said of a token before rows are counted
//   place_messages    where the block's records lie among those that are put
//   push_rows         every token's channels to the ranks of its experts in this domain, and once for each
//                     other domain to where they leave, cast on the way
//   count_rows        rows of each expert, of the tokens before the block's
//   post_words        block 0: for each rank, which tokens come, how many rows, and what all must pass alike
//   write_headers     where each message's rows go
//   pad_messages      zeros where nobody has written
//   signal_messages   the last warp: a flag for each that goes to another rank of this domain, behind all that
//                     the block stored
//   put_messages      the last block of all: to each gateway the words and records for its domain, in one put
//   keep_hash         block 0: of the top-k indices, for the combine
//   relay_messages    what this rank is gateway of: words, and each record to the ranks that it is for
//   receive_messages  each message, as it comes, to the rows of its experts; this rank's own first. Before that
//                     every block waits for the words of all live ranks
//   finish            looks for what went wrong
//   report_fault      one thread, if something did
//
// Who waits for whom: every block for what ranks along rails put, which wait for nobody before; then for the
// words of all live ranks and the messages that neighbours have relayed. So all blocks must be resident
// together.
#pragma once

#include "kernels/low_latency_rails/dispatch_relay.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_rail_dispatch_kernel, RailDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const Before before = read_before(args, watching);
  const Entries entries = first_entries(args);
  const Outgoing first = first_outgoing(args);
  const RailDispatchCall call = start(args, before, watching);
  advance_epoch(call);
  const HeaderDraft draft = first_header(args);
  place_messages(call);
  push_rows(call, first);
  count_rows(call, entries);
  post_words(call);
  write_headers(call, draft);
  pad_messages(call);
  signal_messages(call);
  put_messages(call);
  keep_hash(call);
  relay_messages(call);
  receive_messages(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyDispatch);
}

}  // namespace deepep::kernels
