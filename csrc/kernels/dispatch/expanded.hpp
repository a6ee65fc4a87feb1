// Dispatch by top-k indices into the expanded layout: mode kExpanded. As in topk.hpp; rows of peers are spread
// to one for each of their experts here while the others are on their way, this rank's own straight from x.
//
// Phases:
//   prefetch_indices      to the cache, while the epoch is on its way
//   start                 reads the epoch
//   clear_progress        shared words of streams
//   assign_tokens         push blocks write rows that leave the rank, local blocks those that stay
//   count_stretches       so many tokens of each stretch go to each rank; with a block barrier
//   post_metadata         block 0 posts their sums and this rank's receive arrays to every rank
//   number_entries        blocks claim groups of tokens: each entry's place among its expert's; the experts'
//                         totals to their ranks
//   place_tokens          every warp works out how many earlier tokens go where its own go, and marks those
//   wait_metadata         every block waits for the metadata of all ranks
//   post_counts_to_host   one block posts how many rows come, while they travel
//   find_bases            local blocks: the experts' totals of all ranks give the row of each entry
//   spread_own_rows       they spread this rank's own tokens, and write their fields
//   zero_gaps             rows between the experts'
//   post_streams          push blocks: where the rows of each warp will be
//   send_rows             rows, fields and places; local blocks that do not spread write theirs as in topk.hpp
//   follow_rows           the last warp of a push block posts which of its rows are there
//   signal_rows           each push block raises its flag at each peer, behind its rows
//   join_spreading        push blocks, if all of this rank's run, find the bases, too, and go on as local ones
//   spread_received_rows  warps, as they are free, claim rows of peers, wait for and spread them
//   pad_slots             no rows of entries that nobody sent
//   save_counts           the handle's counts
//   pad_indices           no expert in the rows past the last one, with num_worst_tokens
//   wait_rows             the last block waits for the flags of all peers' push blocks
//   clear_handle          instead, where ranks disagree or rows do not fit
//   clear_expanded        no entry has a row then
//   grant_credit          block 0: peers may write to this rank's combine staging
//   advance_epoch         each block has read it; the last one advances it, and takes back all claims
//   finish                looks for what went wrong
//   report_fault          one thread, if something did
//
// Who waits for whom: as in topk.hpp; warps for groups of tokens that blocks of this rank, which run, have
// claimed; all blocks for the experts' totals of all ranks, which wait for such blocks alone, and for peers'
// push blocks. Push blocks come first in the launch, and wait for neither before their rows are all written,
// and said to be, and all push blocks of their rank run: else they end, and leave their SMs to those. So there
// is no circle, and no block needs another to be resident.
#pragma once

#include "kernels/dispatch/host_counts.hpp"
#include "kernels/dispatch/signal.hpp"
#include "kernels/dispatch/spread.hpp"

namespace deepep::kernels {

/// Push blocks: each warp but the last posts where its rows will be.
DEEPEP_DEVICE void post_streams(const DispatchCall& call, const WarpShare& share,
                                const FirstToken& first_token) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  if (share.role.push && thread() == 0) fetch_add<relaxed, gpu_scope>(&g.state->pushes_started, 1u);
  if (!share.role.push || warp() == num_warps() - 1) return;
  SharedArray<int32_t> counts(MetadataShared{g.num_ranks}.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  int32_t begin = first_token.before;
  if (lane() < g.num_ranks) begin += static_cast<int32_t>(layout::first_row_of_source(count, g.rank, lane()));
  int rows = 0;
#pragma unroll 1
  for (int64_t t = share.mine.begin; t < share.mine.end; t += kWarpSize) {
    const int size = static_cast<int>(layout::min_of(share.mine.end - t, static_cast<int64_t>(kWarpSize)));
    rows += popcount(going_of<DispatchMode::kExpanded>(args, t, size, wanted_ranks(share.role, g)));
  }
  post_stream(call, begin, rows);
}

/// Rows to where they are received: of push blocks, and of local ones that do not spread them.
DEEPEP_DEVICE void send_rows(const DispatchCall& call, const WarpShare& share, const FirstToken& first_token) {
  HeldRow held;
  held.is_here = false;
  write_rows<DispatchMode::kExpanded>(call, share, first_token, held);
  const bool is_empty = share.mine.begin == share.mine.end;
  if (share.role.push && is_empty && dev::warp() != dev::num_warps() - 1) publish_progress(call, kFinished);
}

DEEPEP_KERNEL(dispatch_expanded_kernel, DispatchArgs, kExpandedThreads) {
  using namespace dev;
  constexpr DispatchMode kMode = DispatchMode::kExpanded;
  prefetch_indices(args);
  const DispatchCall call = start(args);
  clear_progress(call);
  const WarpShare share = assign_tokens(call);
  count_stretches(call, share);
  post_metadata<kMode>(call);
  number_entries(call);
  const FirstToken first_token = place_tokens<kMode>(call, share);
  const uint32_t why = wait_metadata<kMode>(call);
  post_counts_to_host(call, why);
  if (why == 0) {
    bool is_spread = find_bases(call, share);
    if (is_spread) {
      spread_own_rows(call, share, first_token);
      zero_gaps(call, share);
    } else {
      post_streams(call, share, first_token);
      send_rows(call, share, first_token);
      follow_rows(call, share);
      signal_rows(call, share);
    }
    is_spread = is_spread || join_spreading(call, share);
    if (is_spread) spread_received_rows(call);
    pad_slots(call, share, is_spread);
    save_counts(call);
    pad_indices(call, share);
    wait_rows(call);
  } else {
    clear_handle(call, share);
    clear_expanded(call, share);
  }
  grant_credit(call);
  advance_epoch(call);
  if (finish(call)) report_fault(call.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
