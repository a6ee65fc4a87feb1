// The send half of a low-latency combine, in a launch of its own.
//
// Phases:
//   start            reads the epoch
//   advance_epoch    each block has read it; the last one advances it
//   post_digest      block 0: that this rank combines, along which dispatch, or that it refuses to
//   post_weights     block 0, where the dispatch carried none: to the ranks of the experts
//   wait_owners      in that case, for the digests of all live ranks
//   list_returns     the messages whose rows go back
//   reduce_messages  each message's rows, weighted, to one, which goes to the token's owner
//   signal_returns   a flag for each, behind the block's rows
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: where weights come with the combine, every block for block 0 of every live rank, its own
// included; else nobody.
#pragma once

#include "kernels/low_latency/combine_reduce.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(low_latency_combine_send_kernel, LowLatencyCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const LowLatencyCombineCall call = start(args);
  sync_block();
  advance_epoch(call);
  post_digest(call);
  post_weights(call);
  if (wait_owners(call)) {
    list_returns(call);
    reduce_messages(call);
    signal_returns(call);
  }
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
