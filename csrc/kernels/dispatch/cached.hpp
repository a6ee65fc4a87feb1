// Dispatch along the routing of a handle: mode kCached. Counts and rows come from the handle, and the host
// knows them; receive arrays are new, so metadata goes round all the same.
//
// Phases:
//   start           reads the epoch
//   post_metadata   block 0 posts this rank's receive arrays to every rank
//   assign_tokens   push blocks write rows that leave the rank, local blocks those that stay; a stretch a warp
//   place_tokens    every warp looks up where its first token goes
//   read_first_row  and has its row in registers, before the metadata is here
//   wait_metadata   every block waits for the metadata of all ranks
//   write_rows      rows and scales to their places
//   signal_rows     each push block raises its flag at each peer, behind its rows
//   wait_rows       the last block waits for the flags of all peers' push blocks
//   grant_credit    block 0: peers may write to this rank's combine staging
//   advance_epoch   each block has read it; the last one advances it
//   finish          looks for what went wrong
//   report_fault    one thread, if something did
#pragma once

#include "kernels/dispatch/signal.hpp"
#include "kernels/dispatch/write.hpp"

namespace deepep::kernels {

DEEPEP_RECORDED_KERNEL(dispatch_cached_kernel, DispatchArgs, kDispatchThreads) {
  using namespace dev;
  constexpr DispatchMode kMode = DispatchMode::kCached;
  const DispatchCall call = start(args, lines);
  sync_block();
  post_metadata<kMode>(call);
  const WarpShare share = assign_tokens(call);
  const FirstToken first_token = place_tokens<kMode>(call, share);
  HeldRow first_row = read_first_row(call, share);
  const uint32_t why = wait_metadata<kMode>(call);
  if (why == 0) {
    write_rows<kMode>(call, share, first_token, first_row);
    signal_rows(call, share);
    wait_rows(call);
  }
  grant_credit(call);
  advance_epoch(call);
  if (finish(call)) report_fault(call.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
