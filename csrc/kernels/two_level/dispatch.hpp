// Dispatch over several domains: a token crosses to a domain once, to its source's gateway there, which spreads
// it over NVLink. Counts and rows are found out, and fill a handle. docs/kernels.md has the protocol.
//
// Phases:
//   start                reads the epoch
//   post_metadata        block 0 posts this rank's counts to its neighbours, and by puts to its gateways
//   relay_metadata       block 0 posts to its neighbours what sources of other domains have put here
//   assign_tokens        all blocks both push and write what stays
//   wait_metadata        every block waits for the metadata of all ranks, which fixes every row of every rank
//   post_counts_to_host  one block posts how many rows come, while they travel
//   move_rows            items that blocks claim: chunks for other domains, rows that stay in this one, and the
//                        spreading of chunks that have come
//   signal_rows          each block raises its flag at each neighbour, behind its rows
//   save_counts          the handle's counts
//   pad_indices          no expert in the rows past the last one, with num_worst_tokens
//   wait_rows            the last block waits for the flags of all neighbours' blocks
//   clear_counts         instead, where ranks disagree or rows do not fit
//   advance_epoch        the last block to come here advances it, and the windows that have passed
//   finish               looks for what went wrong
//   report_fault         one thread, if something did
//
// Who waits for whom: all blocks for block 0 of every live rank and of its gateways; an item for items of
// earlier stages (move_rows.hpp); the last block for the neighbours' blocks. Block 0 posts before it waits, an
// item waits only for what blocks that run have claimed before, so no block needs another one to be resident.
// No quiet, and no fence of puts: a put carries its own bytes, and what lies where it wrote is granted by the
// reader.
#pragma once

#include "kernels/two_level/move_rows.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(two_level_dispatch_kernel, TwoLevelDispatchArgs, kTwoLevelDispatchThreads) {
  using namespace dev;
  const TwoLevelDispatchCall call = start(args);
  sync_block();
  post_metadata(call);
  relay_metadata(call);
  const WarpShare share = assign_tokens(call.near);
  const uint32_t why = wait_metadata<false>(call);
  post_counts_to_host(call, why);
  if (why == 0) {
    const bool moved = move_rows<false>(call);
    signal_rows(call, share, moved);
    save_counts(call);
    pad_indices(call, share);
    wait_rows(call);
  } else {
    clear_counts(call);
  }
  advance_epoch(call, why);
  if (finish(call.near)) report_fault(call.all, call.near.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
