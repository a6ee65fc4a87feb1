// A low-latency combine in one launch that rounds once: every row goes back, in LogFMT, and the owner weights
// and sums.
//
// Phases:
//   read_before      the epoch of the call before, and who is masked
//   first_ranks      asks for what is needed at the end
//   start            this call's epoch
//   advance_epoch    each block has read it; the last one advances it
//   post_shapes      block 0: that this rank combines, and how, or that it refuses to
//   list_returns     the messages whose rows go back
//   post_indices     block 0: whether the top-k indices are the dispatch's, and which that is
//   encode_entries   each message's rows, in LogFMT, to the token's owner; this rank's own as well
//   signal_returns   the last warp: a flag for each message, behind all of the block's rows
//   decode_entries   the rows of each token are decoded, weighted and summed, k ascending. Before that every
//                    block waits for the digests of all live ranks: they combine along the same dispatch
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for block 0 of every live rank, and for the blocks that return what it sums,
// this rank's own included. No weight travels.
#pragma once

#include "kernels/low_latency/combine_decode.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_combine_exact_logfmt_kernel, LowLatencyCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, watching);
  const uint32_t ranks = first_ranks(args, block());
  LowLatencyCombineCall call = start(args, before, ranks, watching);
  advance_epoch(call);
  post_shapes(call);
  list_returns(call, before);
  post_indices(call);
  encode_entries(call);
  sync_block();
  signal_returns(call);
  decode_entries(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
