// The receive half of a low-latency combine whose rows travel in LogFMT, in a launch of its own: the hook.
//
// Phases:
//   first_ranks      asks for what the sums need
//   start_receive    the epoch of its send
//   decode_returns   the rows that come back of each token are decoded and summed, ranks ascending. Before that
//                    every block waits for the digests of all live ranks: they combine along the same dispatch
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: every block for every live rank's send half, this rank's own included, which has ended.
#pragma once

#include "kernels/low_latency/combine_decode.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_combine_logfmt_receive_kernel, LowLatencyCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const uint32_t ranks = first_ranks(args, block());
  LowLatencyCombineCall call = start_receive(args, ranks, watching);
  sync_block();
  decode_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
