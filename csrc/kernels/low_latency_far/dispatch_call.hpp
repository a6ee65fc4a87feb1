// A low-latency dispatch between domains as its blocks see it: to ranks of this domain as inside one, to the
// others by puts. What goes to a rank by a put lies side by side in the order of its tokens, so a block has to
// know how many before its own go there.
#pragma once

#include "kernels/low_latency/dispatch_push.hpp"
#include "kernels/low_latency/dispatch_spread.hpp"
#include "kernels/low_latency_far/puts.hpp"

namespace deepep::kernels {

/// The block's words behind those of a dispatch inside a domain.
struct FarDispatchShared {
  int64_t begin;
  int num_sent;

  [[nodiscard]] DEEPEP_HD int64_t sent() const { return begin; }  // uint32: Sent
  /// int32 [32]: tokens before the block's that go to each rank.
  [[nodiscard]] DEEPEP_HD int64_t before() const { return begin + 16; }
  /// uint32 [tokens_per_block]: ranks that the block's tokens go to, as bits.
  [[nodiscard]] DEEPEP_HD int64_t going() const { return before() + 4 * layout::kMaxRanks; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return layout::align_up(going() + 4 * num_sent, 16); }
};

[[nodiscard]] DEEPEP_HD FarDispatchShared far_shared_of(const LowLatencyDispatchArgs& args) {
  return {shared_of(args).bytes(), args.share.tokens_per_block};
}

struct FarDispatchCall : LowLatencyDispatchCall {
  static constexpr bool kIsFar = true;

  const FarRanks& far;
  FarTurn turn;

  [[nodiscard]] DEEPEP_DEVICE FarDispatchShared far_shared() const { return far_shared_of(args); }
  [[nodiscard]] DEEPEP_DEVICE const LowLatencyDispatchCall& near() const { return *this; }
};

/// Of a launch that sends. All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE FarDispatchCall start(const FarDispatchArgs& args, const Before& before,
                                                  bool watching) {
  using namespace dev;
  const LowLatencyDispatchArgs& near = args;
  SharedArray<int32_t> tokens_before(far_shared_of(near).before());
  if (thread() < layout::kMaxRanks) tokens_before.set(thread(), 0);
  return {start(near, before, watching), args.far, turn_of(load(&args.far.state->dispatches))};
}

/// Of a launch that only receives: what its send has left.
[[nodiscard]] DEEPEP_DEVICE FarDispatchCall start_receive(const FarDispatchArgs& args, bool watching) {
  const LowLatencyDispatchArgs& near = args;
  return {start_receive(near, watching), args.far, turn_of(dev::load_once(&args.far.state->dispatches) - 1)};
}

/// A far rank's words come all at once.
[[nodiscard]] DEEPEP_DEVICE bool wait_posted(const FarDispatchCall& call, int64_t offset, int source, int word,
                                             uint32_t& value) {
  using namespace dev;
  if (is_mapped(call, source)) return wait_posted(call.near(), offset, source, word, value);
  if (!wait_put(call, FarPut::kMessages, source, Phase::kCounts)) return false;
  const auto* words = arrived_at<uint64_t>(call.far, call.turn, source, call.far.slots.words());
  value = unpack_tagged(load(words + word)).value;
  return true;
}

/// Whether they have come. It orders nothing.
[[nodiscard]] DEEPEP_DEVICE bool has_posted(const FarDispatchCall& call, int source) {
  return has_put(call, FarPut::kMessages, source);
}

/// A far rank's messages have come with its words, which all of the block has waited for.
[[nodiscard]] DEEPEP_DEVICE bool wait_message(const FarDispatchCall& call, const uint32_t* flag, int source) {
  return !is_mapped(call, source) || wait_message(call.near(), flag, source);
}

[[nodiscard]] DEEPEP_DEVICE const std::byte* message_of(const FarDispatchCall& call, const MessageAt& where) {
  if (is_mapped(call, where.source)) return message_of(call.near(), where);
  const Presence present = present_of(call);
  const int place = tokens_before(present.bits, where.source * present.words, where.token);
  return arrived_at<std::byte>(call.far, call.turn, where.source,
                               call.far.slots.messages() + place * call.message.bytes());
}

}  // namespace deepep::kernels
