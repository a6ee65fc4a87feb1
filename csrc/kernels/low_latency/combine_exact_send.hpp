// The send half of a low-latency combine that rounds once, in a launch of its own.
//
// Phases:
//   read_before     the epoch of the call before, and who is masked
//   start           this call's epoch
//   advance_epoch   each block has read it; the last one advances it
//   post_shapes     block 0: that this rank combines, and how, or that it refuses to
//   list_returns    the messages whose rows go back
//   post_indices    block 0: whether the top-k indices are the dispatch's, and which that is
//   return_entries  each message's rows, as they are, to the token's owner; this rank's own stay
//   signal_returns  the last warp: a flag for each message, behind all of the block's rows
//   finish          looks for what went wrong
//   report_fault    one thread, if something did
//
// Who waits for whom: nobody.
#pragma once

#include "kernels/low_latency/combine_entries.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_combine_exact_send_kernel, LowLatencyCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const CombineBefore before = read_before(args, true);  // it has one form, for calls with masks, too
  const LowLatencyCombineCall call = start(args, before, 0, false);
  advance_epoch(call);
  post_shapes(call);
  list_returns(call, before);
  post_indices(call);
  return_entries(call);
  sync_block();
  signal_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
