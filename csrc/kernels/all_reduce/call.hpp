// A call of an all-reduce as its phases see it, its blocks of elements, and who owns which of them.
#pragma once

#include "kernels/all_reduce/messages.hpp"

namespace deepep::kernels {

struct AllReduceCall {
  const AllReduceArgs& args;
  uint32_t epoch;
  dev::Deadline deadline;
};

/// The block's shared memory: a word that says whether a call before has failed, and one for each round, that
/// says whether a rank was waited for in vain in it: so no thread reads what a faster one already writes.
inline constexpr int kReduceSharedWords = 3;
[[nodiscard]] DEEPEP_HD constexpr int failure_word(layout::ReduceRound round) {
  return 1 + static_cast<int>(round);
}

/// Whether this block has failed before it comes to wait in `round`: then nothing is read, and nothing pushed,
/// where others may still read what came in the call that failed. Behind a block barrier.
[[nodiscard]] DEEPEP_DEVICE bool has_failed_before(layout::ReduceRound round) {
  const dev::SharedArray<uint32_t> failed(0);
  if (round == layout::ReduceRound::kAddends) return failed.get(0) != 0;
  return (failed.get(0) | failed.get(1)) != 0;
}
[[nodiscard]] DEEPEP_DEVICE bool has_failed_in(layout::ReduceRound round) {
  return has_failed_before(round) || dev::SharedArray<uint32_t>(0).get(failure_word(round)) != 0;
}

/// All threads.
[[nodiscard]] DEEPEP_DEVICE AllReduceCall start(const AllReduceArgs& args) {
  using namespace dev;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (thread() == 0) {
    SharedArray<uint32_t> failed(0);
    failed.set(0, load<relaxed, gpu_scope>(&args.state->missing));
    failed.set(1, 0);
    failed.set(2, 0);
  }
  sync_block();
  return {args, next_epoch(&args.state->epoch), deadline};
}

/// One thread of the block, behind a block barrier: not the one that raises flags, since both have a fence.
DEEPEP_DEVICE void advance_epoch(const AllReduceCall& call) {
  using namespace dev;
  AllReduceState* state = call.args.state;
  if (thread() == num_threads() - 1) advance_epoch(&state->blocks_started, &state->epoch, call.epoch);
}

/// Blocks of elements: those of one owner, the first ranks' longer by one.
struct ReducePart {
  int64_t first;
  int64_t blocks;
};
[[nodiscard]] DEEPEP_DEVICE ReducePart part_of(const AllReduceArgs& args, int owner) {
  const int64_t all = layout::num_gradient_blocks(args.count);
  const int64_t each = all / args.num_ranks, longer = all % args.num_ranks;
  return {owner * each + layout::min_of(int64_t{owner}, longer), each + (owner < longer)};
}
[[nodiscard]] DEEPEP_DEVICE ReducePart whole_of(const AllReduceArgs& args) {
  return {0, layout::num_gradient_blocks(args.count)};
}

/// Calls `visit` with the numbers, within a part, of the blocks that are this warp's: on every rank the same
/// warp of the same block has them, so that a block's flags say all about what it reads.
template <class Visit>
DEEPEP_DEVICE void for_each_block(const ReducePart& part, const Visit& visit) {
  using namespace dev;
  const int64_t step = int64_t{num_blocks()} * num_warps();
  for (int64_t i = int64_t{warp()} * num_blocks() + block(); i < part.blocks; i += step) visit(i);
}

/// This lane's first element of a block.
[[nodiscard]] DEEPEP_DEVICE int64_t element_of(const ReducePart& part, int64_t block) {
  return (part.first + block) * layout::kGradientBlock + kLaneElements * dev::lane();
}
[[nodiscard]] DEEPEP_DEVICE uint32_t dice_index(const AllReduceArgs& args, int64_t element) {
  return args.first_index + static_cast<uint32_t>(element);
}

/// The k-th rank after this one, so that no two ranks begin with the same.
[[nodiscard]] DEEPEP_DEVICE int rank_after(const AllReduceArgs& args, int k) {
  const int other = args.rank + k;
  return other < args.num_ranks ? other : other - args.num_ranks;
}

}  // namespace deepep::kernels
