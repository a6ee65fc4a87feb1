// A low-latency combine as its blocks see it: the call, its shared memory, how a launch begins and ends.
#pragma once

#include "kernels/low_latency/patience.hpp"

namespace deepep::kernels {

/// The block's dynamic shared memory.
struct LowLatencyCombineShared {
  int num_ranks;
  int token_words;
  int num_warps;
  int staged_rows;   // that a warp has room for,
  int staged_bytes;  // each

  [[nodiscard]] DEEPEP_HD int64_t failed() const { return 0; }  // uint32: bits of Phases
  /// The same of the wait for digests alone.
  [[nodiscard]] DEEPEP_HD int64_t stopped() const { return 4; }
  [[nodiscard]] DEEPEP_HD int64_t hash() const { return 8; }      // uint32
  [[nodiscard]] DEEPEP_HD int64_t mending() const { return 12; }  // uint32: Mending
  /// uint32: owners of which a weight or a digest did not come, as bits.
  [[nodiscard]] DEEPEP_HD int64_t lost() const { return mending() + 4 * Mending::kWords; }
  /// uint32 [R, token words]: tokens that came from each source, as bits.
  [[nodiscard]] DEEPEP_HD int64_t tokens() const { return lost() + 4; }
  /// An mbarrier a warp.
  [[nodiscard]] DEEPEP_HD int64_t barriers() const {
    return layout::align_up(tokens() + 4 * num_ranks * token_words, int64_t{16});
  }
  /// Row i of a warp's.
  [[nodiscard]] DEEPEP_HD int64_t stage(int warp, int i) const {
    return layout::align_up(barriers() + 8 * num_warps, int64_t{16}) +
           (int64_t{warp} * staged_rows + i) * staged_bytes;
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return stage(num_warps, 0); }
};

[[nodiscard]] DEEPEP_HD LowLatencyCombineShared shared_of(const LowLatencyCombineArgs& args) {
  return {.num_ranks = args.group.num_ranks,
          .token_words = (args.max_tokens + 31) / 32,
          .num_warps = args.share.num_warps,
          .staged_rows = args.share.staged_rows,
          .staged_bytes = args.share.staged_bytes};
}

struct LowLatencyCombineCall {
  using Args = LowLatencyCombineArgs;
  static constexpr bool kIsFar = false;   // ranks of other domains take part,
  static constexpr bool kIsRail = false;  // and what goes there has gateways

  const Args& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
  uint32_t live;   // ranks that take part, as bits
  bool watching;   // the form of the kernel: known when it is compiled
  bool masks;      // a rank that is missing is masked
  int block;       // whose part of the receive this one has: its own, or in mending every one in turn
  uint32_t ranks;  // that the first token went to which this warp sums, as bits
  Lines lines;

  [[nodiscard]] DEEPEP_DEVICE LowLatencyCombineShared shared() const { return shared_of(args); }
};

/// Clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall begin_call(const LowLatencyCombineArgs& args, uint32_t epoch,
                                                             uint32_t live, uint32_t ranks, bool watching,
                                                             const Lines& lines = {}) {
  using namespace dev;
  const LowLatencyCombineCall call{.args = args,
                                   .g = args.group,
                                   .epoch = epoch,
                                   .deadline = Deadline::in(args.group.timeout_ns),
                                   .live = live,
                                   .watching = watching,
                                   .masks = watching && args.group.shrinks,
                                   .block = block(),
                                   .ranks = ranks,
                                   .lines = lines};
  if (thread() == 0) {
    SharedArray<uint32_t>(call.shared().failed()).set(0, 0);
    SharedArray<uint32_t>(call.shared().stopped()).set(0, 0);
    SharedArray<uint32_t>(call.shared().hash()).set(0, 0);
    SharedArray<uint32_t>(call.shared().lost()).set(0, 0);
    begin_mending(call);
  }
  return call;
}

/// Of the call before, or in a launch that only receives of its own send. `watching`: ranks may be masked.
[[nodiscard]] DEEPEP_DEVICE Before read_own(const LowLatencyCombineArgs& args, bool watching) {
  return {dev::load(&args.group.state->combine_epoch), watching ? dev::load(&args.group.state->masked) : 0};
}

/// What a launch that sends asks for at once, before anything that depends on it.
struct CombineBefore {
  Before own;
  uint32_t identity;  // of the dispatch: its epoch, 0 if it failed
  uint32_t came;      // this thread's word of the tokens that came
};

/// Word i of the tokens that came, [R, token words], or what lies there if the dispatch failed; 0 past the end
/// and of a call that is refused.
[[nodiscard]] DEEPEP_DEVICE uint32_t load_came(const LowLatencyCombineArgs& args, int i) {
  const LowLatencyCombineShared shared = shared_of(args);
  if (args.refused || i >= shared.num_ranks * shared.token_words) return 0;
  return dev::load_guess(args.handle.came + i);
}

[[nodiscard]] DEEPEP_DEVICE CombineBefore read_before(const LowLatencyCombineArgs& args, bool watching) {
  return {read_own(args, watching), args.refused ? 0 : dev::load_once(args.handle.identity),
          load_came(args, dev::thread())};
}

/// Of a launch that sends. All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall start(const LowLatencyCombineArgs& args,
                                                        const CombineBefore& before, uint32_t ranks,
                                                        bool watching, const Lines& lines = {}) {
  using namespace dev;
  enter(lines, Step::kStart);
  const LowLatencyCombineCall call =
      begin_call(args, next_epoch(before.own.epoch), live_of(args, before.own), ranks, watching, lines);
  sync_block();
  return call;
}

/// Of a launch that only receives: the epoch is what its send has left.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall start_receive(const LowLatencyCombineArgs& args,
                                                                uint32_t ranks, bool watching) {
  const Before before = read_own(args, watching);
  return begin_call(args, before.epoch, live_of(args, before), ranks, watching);
}

DEEPEP_DEVICE void advance_epoch(const LowLatencyCombineCall& call) {
  advance_epoch(call, &call.g.state->combine_epoch);
}

/// True on one thread of a block in which something was waited for in vain, or that has found a disagreement:
/// it has a fault to report.
[[nodiscard]] DEEPEP_DEVICE bool finish(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineShared shared = call.shared();
  enter(call.lines, Step::kFinish);
  sync_block();
  enter(call.lines, Step::kEnd);
  if (thread() != 0) return false;
  if (call.masks) return must_report(call);
  return (SharedArray<uint32_t>(shared.failed()).get(0) | SharedArray<uint32_t>(shared.stopped()).get(0)) != 0;
}

/// The epoch of the other kind of operation.
[[nodiscard]] DEEPEP_DEVICE const uint32_t* other_epoch(const LowLatencyCombineCall& call) {
  return &call.g.state->dispatch_epoch;
}

DEEPEP_DEVICE void forget_failures(const LowLatencyCombineCall& call) {
  const LowLatencyCombineShared shared = call.shared();
  for (const int64_t word : {shared.failed(), shared.stopped()}) dev::SharedArray<uint32_t>(word).set(0, 0);
}

}  // namespace deepep::kernels
