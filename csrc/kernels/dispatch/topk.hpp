// Dispatch by top-k indices alone: mode kTopk. As in dispatch.hpp; where tokens go is found out here as well.
//
// Phases:
//   prefetch_indices     to the cache, while the epoch is on its way
//   start                reads the epoch
//   assign_tokens        push blocks write rows that leave the rank, local blocks those that stay
//   count_stretches      so many tokens of each stretch go to each rank: each block for itself, or all
//                        together; with a block barrier before anything uses the words that start has cleared
//   post_metadata        block 0 posts their sums and this rank's receive arrays to every rank
//   count_experts        one block counts and posts those, or all together, where hosts wait for them
//   place_tokens         every warp works out how many earlier tokens go where its own go, and marks those
//   read_first_row       and has its first row in registers, before the metadata is here
//   wait_metadata        every block waits for the metadata of all ranks
//   post_counts_to_host  one block posts how many rows come, while they travel
//   write_rows           rows, scales, indices and weights to their places, the handle's send_row
//   signal_rows          each push block raises its flag at each peer, behind its rows
//   save_counts          the handle's counts
//   pad_indices          no expert in the rows past the last one, with num_worst_tokens
//   wait_rows            the last block waits for the flags of all peers' push blocks
//   clear_handle         instead, where ranks disagree or rows do not fit
//   grant_credit         block 0: peers may write to this rank's combine staging
//   advance_epoch        each block has read it; the last one advances it, and takes back all claims
//   finish               looks for what went wrong
//   report_fault         one thread, if something did
//
// Who waits for whom: as in dispatch.hpp; and blocks for stretches that others of this rank, which run, have
// claimed; the host's block for the experts' counts of all ranks, which wait for nothing but such blocks.
#pragma once

#include "kernels/dispatch/count_experts.hpp"
#include "kernels/dispatch/handle.hpp"
#include "kernels/dispatch/host_counts.hpp"
#include "kernels/dispatch/signal.hpp"
#include "kernels/dispatch/write.hpp"

namespace deepep::kernels {

DEEPEP_RECORDED_KERNEL(dispatch_topk_kernel, DispatchArgs, kDispatchThreads) {
  using namespace dev;
  constexpr DispatchMode kMode = DispatchMode::kTopk;
  prefetch_indices(args);
  const DispatchCall call = start(args, lines);
  const WarpShare share = assign_tokens(call);
  count_stretches(call, share);
  post_metadata<kMode>(call);
  count_experts(call);
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
