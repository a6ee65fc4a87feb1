// A low-latency combine in one launch.
//
// Phases:
//   read_before      the epoch of the call before, and who is masked
//   first_weights    block 0 asks for what it posts
//   first_route      asks where the rows of the first message are
//   first_ranks      asks for what is needed at the end
//   start            this call's epoch
//   advance_epoch    each block has read it; the last one advances it
//   post_shapes      block 0: that this rank combines, and how, or that it refuses to
//   post_weights     block 0, where the dispatch carried none: to all ranks
//   list_returns     the messages whose rows go back
//   first_return     asks for the first one's rows
//   post_indices     block 0: whether the top-k indices are the dispatch's, and which that is
//   measure_owners   where weights come and the caller wants to know: how long this rank waits for others
//   reduce_messages  each message's rows, weighted, to one, which goes to the token's owner
//   signal_returns   the last warp: a flag for each row, behind all of the block's
//   receive_returns  the rows that come back of each token are summed, ranks ascending. Before that every block
//                    waits for the digests of all live ranks: they combine along the same dispatch
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, and for the blocks that reduce what it sums,
// this rank's own included. So all blocks must be resident together.
#pragma once

#include "kernels/low_latency/combine_reduce.hpp"
#include "kernels/low_latency/combine_sum.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_RECORDED_KERNEL(low_latency_combine_kernel, LowLatencyCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, watching);
  const Weights weights = first_weights(args);
  const Likely likely = first_route(args);
  const uint32_t ranks = first_ranks(args, block());
  LowLatencyCombineCall call = start(args, before, ranks, watching, lines);
  advance_epoch(call);
  post_shapes(call);
  post_weights(call, weights);
  list_returns(call, before);
  const Returning first = first_return(call, likely);
  post_indices(call);
  measure_owners(call);
  reduce_messages(call, first);
  sync_block();
  signal_returns(call);
  receive_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
