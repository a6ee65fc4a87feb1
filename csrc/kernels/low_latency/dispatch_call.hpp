// A low-latency dispatch as its blocks see it: the call, its shared memory, how a launch begins and ends.
#pragma once

#include "kernels/low_latency/patience.hpp"

namespace deepep::kernels {

/// The block's dynamic shared memory.
struct LowLatencyDispatchShared {
  int num_ranks;
  int num_local_experts;
  int token_words;
  int num_sent;

  [[nodiscard]] DEEPEP_HD int64_t failed() const { return 0; }  // uint32: bits of Phases
  [[nodiscard]] DEEPEP_HD int64_t hash() const { return 4; }    // uint32
  /// An mbarrier: all words are here, or will not come.
  [[nodiscard]] DEEPEP_HD int64_t listed() const { return 8; }
  [[nodiscard]] DEEPEP_HD int64_t stopped() const { return 16; }  // as `failed`, of the wait for words alone
  [[nodiscard]] DEEPEP_HD int64_t mending() const { return 20; }  // uint32: Mending
  /// uint32 [tokens_per_block]: ranks that the block's tokens go to, as bits.
  [[nodiscard]] DEEPEP_HD int64_t sent() const { return mending() + 4 * Mending::kWords; }
  /// int32 [R, L]: rows for each expert, then rows from each source.
  [[nodiscard]] DEEPEP_HD int64_t rows() const { return sent() + 4 * num_sent; }
  /// uint32 [R, token words]: tokens for each rank as bits, then tokens from each source. Block 0 alone has the
  /// former.
  [[nodiscard]] DEEPEP_HD int64_t tokens() const { return rows() + 4 * num_ranks * num_local_experts; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return layout::align_up(tokens() + 4 * num_ranks * token_words, 16);
  }
};

[[nodiscard]] DEEPEP_HD LowLatencyDispatchShared shared_of(const LowLatencyDispatchArgs& args) {
  return {args.group.num_ranks, args.num_local_experts, args.slots.words().token_words(),
          args.share.tokens_per_block};
}

[[nodiscard]] DEEPEP_HD layout::LowLatencyMessage message_of(const LowLatencyDispatchArgs& args) {
  if (args.casts) return {args.num_topk, int64_t{args.hidden}, args.hidden / layout::kFp8Group};
  return {args.num_topk, 2 * int64_t{args.hidden}, 0};
}

/// The block sends tokens [begin, end).
struct SentTokens {
  int begin;
  int end;
};

[[nodiscard]] DEEPEP_DEVICE SentTokens tokens_of_block(const LowLatencyDispatchArgs& args, int block) {
  const int tokens = args.refused ? 0 : args.num_tokens;
  const int each = args.share.tokens_per_block;
  const int begin = (block - args.share.first_sender) * each;
  if (block < args.share.first_sender || begin >= tokens) return {0, 0};
  return {begin, layout::min_of(begin + each, tokens)};
}
[[nodiscard]] DEEPEP_DEVICE SentTokens tokens_of_block(const LowLatencyDispatchArgs& args) {
  return tokens_of_block(args, dev::block());
}

struct LowLatencyDispatchCall {
  using Args = LowLatencyDispatchArgs;
  static constexpr bool kIsFar = false;   // ranks of other domains take part,
  static constexpr bool kIsRail = false;  // and what goes there has gateways

  const Args& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
  uint32_t live;  // ranks that take part, as bits
  bool watching;  // the form of the kernel: known when it is compiled
  bool masks;     // a rank that is missing is masked
  int block;      // whose part of the receive this one has: its own, or in mending every one in turn
  layout::LowLatencyMessage message;
  SentTokens tokens;  // that this block sends
  Lines lines;

  [[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchShared shared() const { return shared_of(args); }
};

/// Warps that wait for words: all but the one that raises flags.
[[nodiscard]] DEEPEP_DEVICE int num_listeners() { return layout::max_of(dev::num_warps() - 1, 1); }

/// Clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall begin_call(const LowLatencyDispatchArgs& args,
                                                              uint32_t epoch, uint32_t live, bool watching,
                                                              const Lines& lines = {}) {
  using namespace dev;
  const LowLatencyDispatchCall call{.args = args,
                                    .g = args.group,
                                    .epoch = epoch,
                                    .deadline = Deadline::in(args.group.timeout_ns),
                                    .live = live,
                                    .watching = watching,
                                    .masks = watching && args.group.shrinks,
                                    .block = block(),
                                    .message = message_of(args),
                                    .tokens = tokens_of_block(args),
                                    .lines = lines};
  if (thread() == 0) {
    SharedArray<uint32_t>(call.shared().failed()).set(0, 0);
    SharedArray<uint32_t>(call.shared().stopped()).set(0, 0);
    SharedArray<uint32_t>(call.shared().hash()).set(0, 0);
    begin_mending(call);
    mbarrier_init(SharedArray<uint64_t>(call.shared().listed()).at(0),
                  static_cast<uint32_t>(num_listeners() * kWarpSize));
  }
  return call;
}

/// Of the call before, or in a launch that only receives of its own send. `watching`: ranks may be masked.
[[nodiscard]] DEEPEP_DEVICE Before read_before(const LowLatencyDispatchArgs& args, bool watching) {
  return {dev::load(&args.group.state->dispatch_epoch), watching ? dev::load(&args.group.state->masked) : 0};
}

/// Of a launch that sends. All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall start(const LowLatencyDispatchArgs& args,
                                                         const Before& before, bool watching,
                                                         const Lines& lines = {}) {
  using namespace dev;
  enter(lines, Step::kStart);
  const LowLatencyDispatchCall call =
      begin_call(args, next_epoch(before.epoch), live_of(args, before), watching, lines);
  sync_block();
  return call;
}

/// Of a launch that only receives: the epoch is what its send has left.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall start_receive(const LowLatencyDispatchArgs& args,
                                                                 bool watching) {
  const Before before = read_before(args, watching);
  return begin_call(args, before.epoch, live_of(args, before), watching);
}

DEEPEP_DEVICE void advance_epoch(const LowLatencyDispatchCall& call) {
  advance_epoch(call, &call.g.state->dispatch_epoch);
}

/// True on one thread of a block in which something was waited for in vain: it has a fault to report. A combine
/// along a dispatch that failed is refused, not made.
[[nodiscard]] DEEPEP_DEVICE bool finish(const LowLatencyDispatchCall& call) {
  using namespace dev;
  SharedArray<uint32_t> failed(call.shared().failed());
  SharedArray<uint32_t> stopped(call.shared().stopped());
  enter(call.lines, Step::kFinish);
  sync_block();
  enter(call.lines, Step::kEnd);
  if (thread() != 0) return false;
  if (call.masks ? !must_report(call) : failed.get(0) == 0 && stopped.get(0) == 0) return false;
  if (!call.args.refused) store<relaxed, gpu_scope>(call.args.handle.identity, 0u);
  return true;
}

/// The epoch of the other kind of operation.
[[nodiscard]] DEEPEP_DEVICE const uint32_t* other_epoch(const LowLatencyDispatchCall& call) {
  return &call.g.state->combine_epoch;
}

/// Has the call's block receive what `block` has.
DEEPEP_DEVICE void take_part(LowLatencyDispatchCall& call, int block) { call.block = block; }
DEEPEP_DEVICE void forget_failures(const LowLatencyDispatchCall& call) {
  dev::SharedArray<uint32_t>(call.shared().failed()).set(0, 0);
  dev::SharedArray<uint32_t>(call.shared().stopped()).set(0, 0);
}

}  // namespace deepep::kernels
