// High-throughput dispatch: every row goes straight to its final place at its receiver. Mode kFresh: counts and
// rows are found out, and fill a handle.
//
// Phases:
//   start                reads the epoch
//   post_metadata        block 0 posts this rank's counts and receive arrays to every rank
//   assign_tokens        push blocks write rows that leave the rank, local blocks those that stay; a stretch
//                        of tokens a warp
//   place_tokens         every warp works out how many earlier tokens of this rank go where its own go
//   read_first_row       and has its first row in registers, before the metadata is here
//   wait_metadata        every block waits for the metadata of all ranks, which fixes every row of every rank
//   post_counts_to_host  one block posts how many rows come, while they travel
//   write_rows           rows, scales, indices and weights to their places, the handle's send_row
//   signal_rows          each push block raises its flag at each peer, behind its rows
//   save_counts          the handle's counts
//   pad_indices          no expert in the rows past the last one, with num_worst_tokens
//   wait_rows            the last block waits for the flags of all peers' push blocks; the kernel's end
//                        publishes the rest
//   clear_handle         instead, where ranks disagree or rows do not fit
//   grant_credit         block 0: peers may write to this rank's combine staging
//   advance_epoch        each block has read it; the last one advances it
//   finish               looks for what went wrong
//   report_fault         one thread, if something did
//
// Who waits for whom: all blocks for block 0 of every live rank, their own included; the last block for the
// push blocks of all peers. Block 0 posts before it waits, and nobody waits for a block that comes later in its
// own launch.
#pragma once

#include "kernels/dispatch/handle.hpp"
#include "kernels/dispatch/host_counts.hpp"
#include "kernels/dispatch/signal.hpp"
#include "kernels/dispatch/write.hpp"

namespace deepep::kernels {

DEEPEP_RECORDED_KERNEL(dispatch_kernel, DispatchArgs, kDispatchThreads) {
  using namespace dev;
  constexpr DispatchMode kMode = DispatchMode::kFresh;
  const DispatchCall call = start(args, lines);
  sync_block();
  post_metadata<kMode>(call);
  const WarpShare share = assign_tokens(call);
  const FirstToken first_token = place_tokens<kMode>(call, share);
  HeldRow first_row = read_first_row(call, share);
  const uint32_t why = wait_metadata<kMode>(call);
  post_counts_to_host(call, why);
  if (why == 0) {
    write_rows<kMode>(call, share, first_token, first_row);
    signal_rows(call, share);
    save_counts(call);
    pad_indices(call, share);
    wait_rows(call);
  } else {
    clear_handle(call, share);
  }
  grant_credit(call);
  advance_epoch(call);
  if (finish(call)) report_fault(call.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
