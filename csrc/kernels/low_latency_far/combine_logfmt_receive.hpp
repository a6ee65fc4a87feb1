// The receive half of a low-latency combine between domains whose rows travel in LogFMT, in a launch of its
// own: the hook.
//
// Phases:
//   first_ranks     asks for what is needed at the end
//   start_receive   the epoch and the turn of its send
//   list_sent       the tokens that went to ranks of other domains
//   decode_returns  the rows that come back of each token are decoded and summed, ranks ascending. Before that
//                   every block waits for the digests of all live ranks: they combine along the same dispatch
//   await_returns   block 0, and who has found a disagreement: what other domains have put is here
//   finish          looks for what went wrong
//   report_fault    one thread, if something did
//
// Who waits for whom: every block for every live rank's send half, this rank's own included, which has ended.
#pragma once

#include "kernels/low_latency_far/combine_arrive.hpp"
#include "kernels/low_latency_far/logfmt_puts.hpp"

namespace deepep::kernels {

DEEPEP_WATCHING_KERNEL(low_latency_far_combine_logfmt_receive_kernel, FarCombineArgs, kLowLatencyThreads) {
  using namespace dev;
  const uint32_t ranks = first_ranks(args, block());
  FarCombineCall call = start_receive(args, ranks, watching);
  list_sent(call);
  decode_returns(call);
  await_returns(call);
  if (finish(call)) report_fault(call.g, Operation::kLowLatencyCombine);
}

}  // namespace deepep::kernels
