// A combine as its blocks see it: the call, its shared memory, and who does what. The launch's mode says who
// may push and who may sum. What depends on the counts, parts and is_single, is decided once, in choose_plan:
// the host does not always know them, as after a dispatch with num_worst_tokens or in a graph.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/common/lines.hpp"

namespace deepep::kernels {

inline constexpr int kCombineThreads = 512;
inline constexpr int kFewRows = 512;     // up to so many rows from any rank to any other, they travel in parts
inline constexpr int kFewItems = 360;    // as many parts as 24 SMs have warps, but for one a block that signals
inline constexpr int kMixedPushing = 4;  // warps that push first, in a block of 16 whose others sum meanwhile
inline constexpr int kMixedSumming = 8;  // the same where they sum expanded rows to push, as the others do

/// The block's dynamic shared memory.
struct CombineShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t failed() const {              // uint32
    return layout::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  /// Sums that the block's warps have taken: uint32.
  [[nodiscard]] DEEPEP_HD int64_t taken() const { return failed() + 4; }
  /// The owners' credit, as the credit warp has it: uint32, 0 as long as it waits, kGranted or kNoCredit.
  [[nodiscard]] DEEPEP_HD int64_t credit() const { return failed() + 8; }
  /// Items that each push warp has stored: uint32 [warps].
  [[nodiscard]] DEEPEP_HD int64_t progress() const { return failed() + 16; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return progress() + 4 * kCombineThreads / dev::kWarpSize; }
};

struct CombineCall {
  const CombineArgs& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
  Lines lines;

  /// The handle's counts in shared memory: rows from rank s to rank d. A closure, for nvcc lets layout rules,
  /// which are the host's as well, call nothing else that is the device's alone.
  [[nodiscard]] DEEPEP_DEVICE auto counts() const {
    const dev::SharedArray<int32_t> table(CombineShared{g.num_ranks}.counts());
    return [table, ranks = g.num_ranks](int s, int d) { return table.get(s * ranks + d); };
  }
};

/// Reads the epoch and the handle's counts, clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE CombineCall start(const CombineArgs& args, const Lines& lines = {}) {
  using namespace dev;
  enter(lines, Step::kStart);
  const Group& g = args.group;
  const CombineShared shared{g.num_ranks};
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->combine_epoch);
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> taken(shared.taken());
  SharedArray<uint32_t> credit(shared.credit());
  SharedArray<uint32_t> progress(shared.progress());
  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads())
    counts.set(i, load_once(args.counts + i));
  if (thread() == 0) {
    failed.set(0, 0);
    taken.set(0, 0);
    credit.set(0, 0);
  }
  if (thread() < num_warps()) progress.set(thread(), 0);
  return {.args = args, .g = g, .epoch = epoch, .deadline = deadline, .lines = lines};
}

/// Block 0: peers may write to this rank's staging for this combine.
DEEPEP_DEVICE void grant_credit(const CombineCall& call) {
  if (dev::block() == 0) grant_credit(call.g, call.epoch - 1);
}

/// The warp of a block that posts the digest and advances the epoch: it does neither behind rows of its own, or
/// it would wait for them.
[[nodiscard]] DEEPEP_DEVICE bool posts_digest() { return dev::warp() == dev::num_warps() / 2; }

DEEPEP_DEVICE void advance_epoch(const CombineCall& call) {
  if (posts_digest() && dev::lane() == 0) advance_epoch(call.g, &call.g.state->combine_epoch, call.epoch);
}

/// The roles of a block's warps.
struct CombineRole {
  int push_warps;   // this block's first `push_warps` warps push
  int credit_warp;  // the warp that waits for the owners' credit; -1: none, for nothing is pushed
  int signal_warp;  // the warp that raises flags, likewise
  bool is_single;   // no push warp has more than one item, and all warps sum when they are done
  bool reduces;     // the block sums: all warps, once they are done with the above
  int push_blocks;  // of this launch
  int reduce_blocks;
};

/// The rows that this rank returns, lane r to owner r.
struct ReturnRows {
  int32_t rows;         // so many; none to itself or to a rank that does not take part
  int32_t first_row;    // the first of them here
  int32_t first_place;  // its place in the owner's staging
};

/// The decisions that follow from the mode and the counts.
struct CombinePlan {
  layout::Parts parts;  // of a row
  ReturnRows returns;
  uint32_t num_items;  // to push: a part of every owner's n-th row each
  CombineRole role;
};

/// The number of parts into which a row is cut to travel and to be summed: few rows keep all warps busy only in
/// parts. Every rank comes to the same from the same counts. Whole warps.
[[nodiscard]] DEEPEP_DEVICE layout::Parts choose_parts(const CombineCall& call) {
  const auto count = call.counts();
  const int ranks = call.g.num_ranks;
  int most = 0;  // of lane s: from rank s to any other
  DEEPEP_ROLLED
  for (int d = 0; d < ranks; ++d)
    if (dev::lane() < ranks && d != dev::lane() && count(dev::lane(), d) > most) most = count(dev::lane(), d);
  const auto any_above = [&](int rows) { return dev::ballot(most > rows) != 0; };
  static_assert(layout::StagingLayout::kParts == 4);
  return layout::Parts(any_above(kFewRows)        ? 1
                       : any_above(kFewItems / 3) ? 2
                       : any_above(kFewItems / 4) ? 3
                                                  : 4);
}

[[nodiscard]] DEEPEP_DEVICE ReturnRows returns_of(const CombineCall& call) {
  using namespace dev;
  const Group& g = call.g;
  const auto count = call.counts();
  if (lane() >= g.num_ranks || lane() == g.rank || !is_live(g, lane())) return {0, 0, 0};
  // Never past the owner's staging: a rank with another handle learns of it by the digests, and must do no harm
  // before.
  const int64_t place = layout::first_staging_row(count, lane(), g.rank);
  const int64_t room = layout::max_of(call.args.staging.capacity() - place, int64_t{0});
  return {static_cast<int32_t>(layout::min_of(static_cast<int64_t>(count(lane(), g.rank)), room)),
          static_cast<int32_t>(layout::first_row_of_source(count, lane(), g.rank)),
          static_cast<int32_t>(place)};
}

/// Whole warps.
[[nodiscard]] DEEPEP_DEVICE uint32_t num_return_items(const Group& g, const ReturnRows& returns,
                                                      layout::Parts parts) {
  int32_t most = 0;
  DEEPEP_ROLLED
  for (int owner = 0; owner < g.num_ranks; ++owner)
    most = layout::max_of(most, dev::shuffle(returns.rows, owner));
  return static_cast<uint32_t>(most) * parts.count;
}

[[nodiscard]] DEEPEP_DEVICE CombineRole choose_role(const CombineArgs& args, uint32_t num_items) {
  using namespace dev;
  const int blocks = num_blocks();
  const int warps = num_warps();
  const bool any = num_items > 0;
  if (args.mode != CombineMode::kSplit && num_items <= static_cast<uint32_t>(blocks * warps)) {
    // If there are enough without it, one warp waits for credit and signals.
    if (num_items <= static_cast<uint32_t>(blocks * (warps - 1)))
      return {.push_warps = warps - 1,
              .credit_warp = any ? warps - 1 : -1,
              .signal_warp = any ? warps - 1 : -1,
              .is_single = true,
              .reduces = true,
              .push_blocks = blocks,
              .reduce_blocks = blocks};
    // Else not by one warp: what pushes behind a wait for credit comes late, and what signals is to be done
    // with its own before the others are.
    return {.push_warps = warps,
            .credit_warp = 0,
            .signal_warp = warps - 1,
            .is_single = true,
            .reduces = true,
            .push_blocks = blocks,
            .reduce_blocks = blocks};
  }
  if (args.mode == CombineMode::kMixed) {
    const int mixed = (warps * (args.slots == nullptr ? kMixedPushing : kMixedSumming) + 15) / 16;
    return {.push_warps = mixed,
            .credit_warp = mixed,
            .signal_warp = mixed,
            .is_single = false,
            .reduces = true,
            .push_blocks = blocks,
            .reduce_blocks = blocks};
  }
  const bool pushes = block() < args.push_blocks;
  const int behind = pushes && any ? warps - 1 : -1;
  return {.push_warps = pushes ? warps - 1 : 0,
          .credit_warp = behind,
          .signal_warp = behind,
          .is_single = false,
          .reduces = !pushes,
          .push_blocks = args.push_blocks,
          .reduce_blocks = blocks - args.push_blocks};
}

/// Behind the block barrier that follows `start`. Whole warps.
[[nodiscard]] DEEPEP_DEVICE CombinePlan choose_plan(const CombineCall& call) {
  const layout::Parts parts = choose_parts(call);
  const ReturnRows returns = returns_of(call);
  const uint32_t num_items = num_return_items(call.g, returns, parts);
  return {parts, returns, num_items, choose_role(call.args, num_items)};
}

/// The same where the copy engine returns the rows: all warps sum.
[[nodiscard]] DEEPEP_DEVICE CombinePlan choose_sums_alone(const CombineCall& call) {
  return {choose_parts(call), ReturnRows{}, 0,
          CombineRole{.push_warps = 0,
                      .credit_warp = -1,
                      .signal_warp = -1,
                      .is_single = false,
                      .reduces = true,
                      .push_blocks = 0,
                      .reduce_blocks = dev::num_blocks()}};
}

}  // namespace deepep::kernels
