// A combine that this rank refuses: it takes no part, but the others must not wait for it, and learn that it
// refused. One block.
//
// Phases:
//   start          reads the epoch
//   grant_credit   peers may write to this rank's staging: those that have not seen the refusal do
//   post_refusal   in place of a digest, to all ranks; they sum nothing
//   advance_epoch  so that this rank counts its calls as the others do
//   wait_digests   the others have begun this call, too
//   finish         looks for what went wrong: a refusal always does
//   report_fault   one thread
#pragma once

#include "kernels/combine/digest.hpp"
#include "kernels/combine/finish.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(combine_refused_kernel, CombineArgs, kCombineThreads) {
  using namespace dev;
  const CombineCall call = start(args);
  grant_credit(call);
  sync_block();
  post_refusal(call);
  advance_epoch(call);
  const bool succeeded = wait_digests(call, kRefusal);
  if (finish(call, true, succeeded)) report_fault(call.g, Operation::kCombine);
}

}  // namespace deepep::kernels
