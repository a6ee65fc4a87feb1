// The same along a handle: counts and rows are known, and no top-k travels. dispatch.hpp has the protocol.
//
// Phases:
//   start           reads the epoch
//   post_metadata   block 0 posts this rank's receive arrays to its neighbours, and by puts its shape to
//                   gateways
//   relay_metadata  block 0 posts to its neighbours what sources of other domains have put here
//   assign_tokens   all blocks both push and write what stays
//   wait_metadata   every block waits for the metadata of all ranks; counts are the handle's
//   move_rows       items that blocks claim, as in dispatch.hpp
//   signal_rows     each block raises its flag at each neighbour, behind its rows
//   wait_rows       the last block waits for the flags of all neighbours' blocks
//   advance_epoch   the last block to come here advances it, and the windows that have passed
//   finish          looks for what went wrong
//   report_fault    one thread, if something did
#pragma once

#include "kernels/two_level/move_rows.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(two_level_dispatch_cached_kernel, TwoLevelDispatchArgs, kTwoLevelDispatchThreads) {
  using namespace dev;
  const TwoLevelDispatchCall call = start(args);
  sync_block();
  post_metadata(call);
  relay_metadata(call);
  const WarpShare share = assign_tokens(call.near);
  const uint32_t why = wait_metadata<true>(call);
  if (why == 0) {
    const bool moved = move_rows<true>(call);
    signal_rows(call, share, moved);
    wait_rows(call);
  }
  advance_epoch(call, why);
  if (finish(call.near)) report_fault(call.all, call.near.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
