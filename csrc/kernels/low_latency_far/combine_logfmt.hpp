// A low-latency combine between domains in one launch whose rows travel in LogFMT.
//
// Phases:
//   read_before     the epoch of the call before, and who is masked
//   first_weights   block 0 asks for what it posts
//   first_route     asks where the rows of the first message are
//   first_ranks     asks for what is needed at the end
//   start           this call's epoch, and its turn among those that put
//   advance_epoch   each block has read it; the last one advances it
//   post_shapes     block 0: that this rank combines, and how, or that it refuses to
//   post_weights    block 0, where the dispatch carried none: to the ranks of this domain
//   list_sent       the tokens that went to ranks of other domains
//   stage_weights   block 0: the weights of those, to leave for there
//   list_returns    the messages whose rows go back
//   first_return    asks for the first one's rows
//   post_indices    block 0: whether the top-k indices are the dispatch's, and which that is
//   put_digests     block 0: its digests and weights to each rank of another domain, in one put
//   measure_owners  where weights come and the caller wants to know: how long this rank waits for others
//   encode_sums     each message's rows, weighted, to one in LogFMT: in the memory of the token's owner, or
//                   where it leaves for there
//   signal_returns  the last warp: a flag for each message from an owner of this domain, behind all of the
//                   block's rows
//   put_returns     the last block of all: to each rank of another domain the rows of its tokens, in one put
//   decode_returns  the rows that come back of each token are decoded and summed, ranks ascending. Before that
//                   every block waits for the digests of all live ranks: they combine along the same dispatch
//   await_returns   block 0, and who has found a disagreement: what other domains have put is here
//   finish          looks for what went wrong
//   report_fault    one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, and for the blocks that return what it sums,
// this rank's own included. So all blocks must be resident together.
#pragma once

#include "kernels/low_latency_far/combine_arrive.hpp"
#include "kernels/low_latency_far/combine_put.hpp"
#include "kernels/low_latency_far/logfmt_puts.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_far_combine_logfmt_kernel, FarCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, watching);
  const Weights weights = first_weights(args);
  const Likely likely = first_route(args);
  const uint32_t ranks = first_ranks(args, block());
  FarCombineCall call = start(args, before, ranks, watching);
  advance_epoch(call);
  post_shapes(call);
  post_weights(call, weights);
  list_sent(call);
  stage_weights(call);
  list_returns(call, before);
  const Returning first = first_return(call, likely);
  post_indices(call);
  put_digests(call);
  measure_owners(call);
  encode_sums(call, first);
  sync_block();
  signal_returns(call);
  put_returns(call);
  decode_returns(call);
  await_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
