// The rounds of an all-reduce: a block raises a flag at each other rank, and waits for the same block's of
// each.
#pragma once

#include "kernels/all_reduce/call.hpp"

namespace deepep::kernels {

/// Behind a block barrier that follows the block's stores.
DEEPEP_DEVICE void raise_flags(const AllReduceCall& call, layout::ReduceRound round) {
  using namespace dev;
  const AllReduceArgs& args = call.args;
  const int peer = thread();
  if (peer >= args.num_ranks || peer == args.rank || has_failed_before(round)) return;
  auto* flag = reinterpret_cast<uint32_t*>(args.heap[peer] + args.slots.flag(round, args.rank, block()));
  store<release, sys_scope>(flag, call.epoch);
}

/// A rank that does not come in time is noted, and nobody reads what it was to push. A block barrier follows.
DEEPEP_DEVICE void wait_flags(const AllReduceCall& call, layout::ReduceRound round) {
  using namespace dev;
  const AllReduceArgs& args = call.args;
  const int source = thread();
  if (source >= args.num_ranks || source == args.rank || has_failed_before(round)) return;
  const auto* flag =
      reinterpret_cast<const uint32_t*>(args.heap[args.rank] + args.slots.flag(round, source, block()));
  // A peer may have been through and be in the next call already.
  if (wait_reached<acquire, sys_scope>(flag, call.epoch, call.deadline)) return;
  fetch_or<relaxed, gpu_scope>(&args.state->missing, 1u << source);
  if (args.host_missing != nullptr) fetch_or<relaxed, sys_scope>(args.host_missing, 1u << source);
  SharedArray<uint32_t>(0).bit_or(failure_word(round), 1u);
}

DEEPEP_DEVICE void raise_addend_flags(const AllReduceCall& call) {
  raise_flags(call, layout::ReduceRound::kAddends);
}
DEEPEP_DEVICE void wait_addend_flags(const AllReduceCall& call) {
  wait_flags(call, layout::ReduceRound::kAddends);
}
DEEPEP_DEVICE void raise_result_flags(const AllReduceCall& call) {
  raise_flags(call, layout::ReduceRound::kResults);
}
DEEPEP_DEVICE void wait_result_flags(const AllReduceCall& call) {
  wait_flags(call, layout::ReduceRound::kResults);
}

}  // namespace deepep::kernels
