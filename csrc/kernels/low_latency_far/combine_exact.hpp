// A low-latency combine between domains in one launch that rounds once: every row goes back, and the owner
// weights and sums.
//
// Phases:
//   read_before              the epoch of the call before, and who is masked
//   first_ranks              asks for what is needed at the end
//   start                    this call's epoch, and its turn among those that put
//   advance_epoch            each block has read it; the last one advances it
//   post_shapes              block 0: that this rank combines, and how, or that it refuses to
//   list_sent                the tokens that went to ranks of other domains
//   count_sent_entries       how many rows of each of them come back
//   list_returns             the messages whose rows go back
//   count_entries_that_came  how many go back of each that came from another domain
//   post_indices             block 0: whether the top-k indices are the dispatch's, and which that is
//   put_digests              block 0: its digests and weights to each rank of another domain, in one put
//   return_entries           each message's rows, as they are, to the token's owner, or where they leave for
//                            there; this rank's own stay
//   signal_returns           the last warp: a flag for each message from an owner of this domain, behind all of
//                            the block's rows
//   put_returns              the last block of all: to each rank of another domain the rows of its tokens, in
//                            one put
//   receive_entries          the rows of each token, those that have come back and this rank's own, are summed,
//                            k ascending. Before that every block waits for the digests of all live ranks: they
//                            combine along the same dispatch
//   await_returns            block 0, and who has found a disagreement: what other domains have put is here
//   finish                   looks for what went wrong
//   report_fault             one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, and for the blocks that return what it sums,
// this rank's own included. So all blocks must be resident together. No weight travels.
#pragma once

#include "kernels/low_latency_far/combine_arrive.hpp"
#include "kernels/low_latency_far/combine_put.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_far_combine_exact_kernel, FarCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, watching);
  const uint32_t ranks = first_ranks(args, block());
  FarCombineCall call = start(args, before, ranks, watching);
  advance_epoch(call);
  post_shapes(call);
  list_sent(call);
  count_sent_entries(call);
  list_returns(call, before);
  count_entries_that_came(call);
  post_indices(call);
  put_digests(call);
  return_entries(call);
  sync_block();
  signal_returns(call);
  put_returns(call);
  receive_entries(call);
  await_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
