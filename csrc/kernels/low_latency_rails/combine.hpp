// A low-latency combine between domains in two levels, in one launch.
//
// Phases:
//   read_before       the epoch of the call before, and who is masked
//   first_weights     block 0 asks for what it posts
//   first_route       asks where the rows of the first message are
//   first_ranks       asks for what is needed at the end
//   start             this call's epoch, and its turn among those that put
//   advance_epoch     each block has read it; the last one advances it
//   post_shapes       block 0: that this rank combines, and how, or that it refuses to
//   post_weights      block 0, where the dispatch carried none: to the ranks of this domain
//   list_sent         the tokens that went to other domains
//   stage_weights     block 0: the weights of those, to leave for the gateways
//   list_returns      the messages whose rows go back
//   list_relayed      the tokens that this rank was gateway of
//   first_return      asks for the first message's rows
//   post_indices      block 0: whether the top-k indices are the dispatch's, and which that is
//   put_digests       block 0: its digests and weights to each gateway, in one put
//   relay_digests     block 0: those of ranks along rails, to the ranks of this domain
//   measure_owners    where weights come and the caller wants to know: how long this rank waits for others
//   reduce_messages   each message's rows, weighted, to one: to the token's owner, or its gateway in this
//                     domain
//   signal_returns    the last warp: a flag for each row, behind all of the block's
//   wait_partners     the digests of all live ranks: they combine along the same dispatch
//   sum_domain_rows   what this rank is gateway of: this domain's rows of each token, summed ranks ascending
//                     and rounded, to where they leave
//   put_returns       the last block of all: to each rank along a rail the rows of its tokens, in one put
//   sum_domains       the rows that come back of each token: this domain's likewise, then all domains ascending
//   await_returns     block 0, and who has found a disagreement: what was put along rails is here
//   finish            looks for what went wrong
//   report_fault      one thread, if something did
//
// Who waits for whom: block 0 for what ranks along rails put first, which waits for nobody; every block for
// block 0 of every live rank, directly or relayed; a gateway for the rows of its neighbours, which wait for
// digests and weights alone; an owner for its neighbours' rows and for gateways. So all blocks must be resident
// together.
#pragma once

#include "kernels/low_latency_rails/combine_sum.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_rail_combine_kernel, RailCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, watching);
  const Weights weights = first_weights(args);
  const Likely likely = first_route(args);
  const uint32_t ranks = first_ranks(args, block());
  const RailCombineCall call = start(args, before, ranks, watching);
  advance_epoch(call);
  post_shapes(call);
  post_weights(call, weights);
  list_sent(call);
  stage_weights(call);
  list_returns(call, before);
  list_relayed(call, before);
  const Returning first = first_return(call, likely);
  post_indices(call);
  put_digests(call);
  relay_digests(call, before);
  measure_owners(call);
  reduce_messages(call, first);
  sync_block();
  signal_returns(call);
  const bool agreed = wait_partners(call);
  sum_domain_rows(call, agreed);
  sync_block();
  put_returns(call);
  sum_domains(call, agreed);
  await_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
