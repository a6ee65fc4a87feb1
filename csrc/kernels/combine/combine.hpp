// High-throughput combine: SMs return rows to their tokens' owner, which sums them as they arrive. Modes
// kSplit, kResident and kMixed (common/args.hpp): they differ in who does what, which choose_plan decides once.
//
// Phases:
//   start            reads the epoch and the handle's counts
//   grant_credit     block 0: peers may write to this rank's staging; the kernel that read it has ended
//   choose_plan      how rows are cut, what each warp pushes, which blocks sum: from the mode and the counts
//   post_digest      block 0: what all ranks must pass alike, to all of them
//   advance_epoch    each block has read it; the last one advances it
//   take_early_turn  where every warp has one item to push, it loads what its sum needs before
//   wait_credit      one warp of a pushing block waits until the owners' staging is free
//   push_rows        push warps store each received row in its owner's staging
//   signal_rows      one warp raises the flags behind the rows
//   reduce_rows      the other warps, and push warps that are done, take tokens in order: for each, wait for
//                    the flags of its remote rows, sum bias and rows in rank order in fp32, round once, write.
//                    A rank's own row is read where it lies, and while its peers' are still on their way
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: a credit warp until the owner has granted credit (normally in the dispatch in between, so
// long ago); a reduce warp for digests and flags. Pushing waits for no sum of the same call, so there is no
// circle. Flags carry the epoch; nobody clears them.
#pragma once

#include "kernels/combine/finish.hpp"
#include "kernels/combine/push.hpp"
#include "kernels/combine/reduce.hpp"

namespace deepep::kernels {

DEEPEP_RECORDED_KERNEL(combine_kernel, CombineArgs, kCombineThreads) {
  using namespace dev;
  const CombineCall call = start(args, lines);
  grant_credit(call);
  sync_block();
  const CombinePlan plan = choose_plan(call);
  post_digest(call);
  advance_epoch(call);
  const Turn turn = take_early_turn(call, plan);
  bool succeeded = wait_credit(call, plan);
  succeeded = push_rows<ReceivedRow>(call, plan) && succeeded;
  signal_rows(call, plan);  // a warp that waits for flags waits for none of this call's sums
  succeeded = reduce_rows<ReceivedRow>(call, plan, turn) && succeeded;
  if (finish(call, plan.role.reduces, succeeded)) report_fault(call.g, Operation::kCombine);
}

}  // namespace deepep::kernels
