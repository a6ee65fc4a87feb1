// The send half of a low-latency combine between domains that rounds once and whose rows travel in LogFMT, in
// a launch of its own.
//
// Phases:
//   read_before              the epoch of the call before, and who is masked
//   start                    this call's epoch, and its turn among those that put
//   advance_epoch            each block has read it; the last one advances it
//   post_shapes              block 0: that this rank combines, and how, or that it refuses to
//   clear_rows               of no message any, so far
//   list_returns             the messages whose rows go back
//   count_entries_that_came  how many go back of each that came from another domain
//   post_indices             block 0: whether the top-k indices are the dispatch's, and which that is
//   put_digests              block 0: its digests and weights to each rank of another domain, in one put
//   encode_entries           each message's rows, in LogFMT, to the token's owner, or where they leave for
//                            there; this rank's own as well
//   signal_returns           the last warp: a flag for each message from an owner of this domain, behind all of
//                            the block's rows
//   put_returns              the last block of all: to each rank of another domain the rows of its tokens, in
//                            one put
//   finish                   looks for what went wrong
//   report_fault             one thread, if something did
//
// Who waits for whom: nobody.
#pragma once

#include "kernels/low_latency_far/combine_put.hpp"
#include "kernels/low_latency_far/logfmt_puts.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_far_combine_exact_logfmt_send_kernel, FarCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, true);  // it has one form
  const FarCombineCall call = start(args, before, 0, false);
  advance_epoch(call);
  post_shapes(call);
  clear_rows(call);
  list_returns(call, before);
  count_entries_that_came(call);
  post_indices(call);
  put_digests(call);
  encode_entries(call);
  sync_block();
  signal_returns(call);
  put_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
