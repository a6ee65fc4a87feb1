// The send half of a low-latency dispatch between domains, in a launch of its own.
//
// Phases:
//   read_before       the epoch of the call before, and who is masked
//   first_entries     asks for what is counted first
//   first_outgoing    asks for what is sent first
//   start             this call's epoch, and its turn among those that put
//   advance_epoch     each block has read it; the last one advances it
//   first_header      what can be said of a token before rows are counted
//   place_messages    where the block's messages lie among those that are put
//   push_rows         every token's channels to the ranks of its experts, once each, cast on the way; to ranks
//                     of other domains they leave from this one's memory
//   count_rows        rows of each expert, of the tokens before the block's
//   post_words        block 0: for each rank, which tokens come, how many rows, and what all must pass alike
//   write_headers     where each message's rows go
//   pad_messages      zeros where nobody has written
//   signal_messages   the last warp: a flag for each that goes to another rank of this domain, behind all that
//                     the block stored
//   put_messages      the last block of all: to each rank of another domain its words and messages, in one put
//   keep_hash         block 0: of the top-k indices, for the combine
//
// Who waits for whom: nobody.
#pragma once

#include "kernels/low_latency_far/dispatch_put.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_far_dispatch_send_kernel, FarDispatchArgs, kLowLatencyThreads) {
  using namespace dev;
  const Before before = read_before(args, true);  // it has one form
  const Entries entries = first_entries(args);
  const Outgoing first = first_outgoing(args);
  const FarDispatchCall call = start(args, before, false);
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
}

}  // namespace deepep::kernels
