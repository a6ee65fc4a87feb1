// Combine in which the copy engine returns the rows, and all SMs sum: for few SMs and many rows
// (docs/kernels.md). Receivers cannot tell: the flags are the same, and each rank decides for itself.
//
// Phases:
//   start              reads the epoch and the handle's counts
//   grant_credit       block 0: peers may write to this rank's staging; the kernel that read it has ended
//   choose_sums_alone  how rows are cut; nothing is pushed, all warps sum
//   post_digest        block 0: what all ranks must pass alike, to all of them
//   advance_epoch      each block has read it; the last one advances it
//   drive_copy_engine  one warp waits until the owners' staging is free, rings the engine's doorbell, and
//                      raises the flags of each chunk's rows when the engine has copied it
//   reduce_rows        all warps but that one from the start: see combine.hpp
//   finish             looks for what went wrong
//   wait_copy_engine   no fault is reported while copies are under way
//   report_fault       one thread, if something went wrong
//
// Who waits for whom: the driving warp for the owners' credit and for its own engine; the engine for that warp;
// sums as ever. No circle, and no block needs another to be resident.
#pragma once

#include "kernels/combine/drive.hpp"
#include "kernels/combine/finish.hpp"
#include "kernels/combine/reduce.hpp"
#include "kernels/combine/row.hpp"

namespace deepep::kernels {

DEEPEP_RECORDED_KERNEL(combine_copy_engine_kernel, CombineArgs, kCombineThreads) {
  using namespace dev;
  const CombineCall call = start(args, lines);
  grant_credit(call);
  sync_block();
  const CombinePlan plan = choose_sums_alone(call);
  post_digest(call);
  advance_epoch(call);
  bool succeeded = drive_copy_engine(call, plan);
  succeeded = reduce_rows<ReceivedRow>(call, plan, Turn{0, -1}) && succeeded;
  if (finish(call, true, succeeded)) {
    wait_copy_engine(args);
    report_fault(call.g, Operation::kCombine);
  }
}

}  // namespace deepep::kernels
