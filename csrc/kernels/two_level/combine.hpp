// Combine over several domains, back along the tree of the dispatch: a domain's rows of a token are summed at
// the token's gateway, which sends one sum; its owner adds the domains' sums. docs/kernels.md has the protocol.
//
// Phases:
//   start          reads the epoch
//   read_counts    of the handle's counts, those that concern this rank, and a digest of all
//   post_digest    block 0: what all ranks must pass alike, and T, to its neighbours and by puts to its
//                  gateways
//   relay_digests  block 0 posts to its neighbours what ranks of other domains have put here
//   wait_digests   every block waits for those of all live ranks
//   return_rows    items that blocks claim: what owners ask their gateways for, rows on their way to
//                  gateways, sums on their way to owners, and owners' own sums
//   advance_epoch  the last block to come here advances it, and the windows that have passed
//   finish         looks for what went wrong
//   report_fault   one thread, if something did
//
// Who waits for whom: all blocks for block 0 of every live rank and of its gateways; an item for items of
// earlier stages (return_rows.hpp). So no block needs another one to be resident. No quiet, and no fence of
// puts.
#pragma once

#include "kernels/two_level/return_rows.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(two_level_combine_kernel, TwoLevelCombineArgs, kCombineThreads) {
  using namespace dev;
  const TwoLevelCombineCall call = start(args);
  sync_block();
  read_counts(call);
  post_digest(call);
  bool succeeded = relay_digests(call);
  const bool agrees = wait_digests(call);
  if (agrees) succeeded = return_rows(call) && succeeded;
  advance_epoch(call, agrees);
  if (finish(call, succeeded && agrees)) report_fault(call.all, call.near.g, Operation::kCombine);
}

}  // namespace deepep::kernels
