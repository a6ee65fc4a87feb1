// Combine of expanded rows, one for each of a token's experts here: this rank's are summed while they are read,
// so that one row a token returns, in no pass of its own. Receivers see none of it: the same travels, and
// each rank decides for itself. Modes as of combine.hpp; no copy engine sums.
//
// Phases:
//   start            reads the epoch and the handle's counts
//   grant_credit     block 0: peers may write to this rank's staging; the kernel that read it has ended
//   choose_plan      how rows are cut, what each warp pushes, which blocks sum: from the mode and the counts
//   post_digest      block 0: what all ranks must pass alike, to all of them
//   advance_epoch    each block has read it; the last one advances it
//   take_early_turn  where every warp has one item to push, it loads what its sum needs before
//   wait_credit      one warp of a pushing block waits until the owners' staging is free
//   push_rows        push warps sum the entries of each received row, k ascending in fp32, round once, and
//                    store that in its owner's staging
//   signal_rows      one warp raises the flags behind the rows
//   reduce_rows      as of combine.hpp; a rank's own row is summed likewise, and rounded, before it is added
//   finish           looks for what went wrong
//   report_fault     one thread, if something did
//
// Who waits for whom: as in combine.hpp.
#pragma once

#include "kernels/combine/finish.hpp"
#include "kernels/combine/push.hpp"
#include "kernels/combine/reduce.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(combine_expanded_kernel, CombineArgs, kCombineThreads) {
  using namespace dev;
  const CombineCall call = start(args);
  grant_credit(call);
  sync_block();
  const CombinePlan plan = choose_plan(call);
  post_digest(call);
  advance_epoch(call);
  const Turn turn = take_early_turn(call, plan);
  bool succeeded = wait_credit(call, plan);
  succeeded = push_rows<ExpandedRow>(call, plan) && succeeded;
  signal_rows(call, plan);  // a warp that waits for flags waits for none of this call's sums
  succeeded = reduce_rows<ExpandedRow>(call, plan, turn) && succeeded;
  if (finish(call, plan.role.reduces, succeeded)) report_fault(call.g, Operation::kCombine);
}

}  // namespace deepep::kernels
