// A low-latency dispatch as its blocks see it: the call, its shared memory, how a launch begins and ends.
#pragma once

#include "kernels/low_latency/common.hpp"
#include "layout/prefix.hpp"

namespace deepep::kernels {

/// The block's dynamic shared memory, of both halves: they use it one after the other, but for `failed`.
struct LowLatencyDispatchShared {
  int num_ranks;
  int num_local_experts;

  [[nodiscard]] DEEPEP_HD int64_t failed() const { return 0; }  // uint32: bits of Phases
  [[nodiscard]] DEEPEP_HD int64_t hash() const { return 4; }    // uint32
  /// Of the send half: int32 [E] rows of each expert, then [R] messages for each rank.
  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 16; }
  /// Of the receive half: int32 [R, L] rows from each source, then those of the sources before it.
  [[nodiscard]] DEEPEP_HD int64_t bases() const { return 16; }
  /// int32 [R], [R + 1] and [L]: messages of each source, the list of all, rows of each expert.
  [[nodiscard]] DEEPEP_HD int64_t messages() const { return bases() + 4 * num_ranks * num_local_experts; }
  [[nodiscard]] DEEPEP_HD int64_t list() const { return messages() + 4 * num_ranks; }
  [[nodiscard]] DEEPEP_HD int64_t totals() const { return list() + 4 * (num_ranks + 1); }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return layout::align_up(totals() + 4 * num_local_experts, 16);
  }
};

[[nodiscard]] DEEPEP_HD layout::LowLatencyMessage message_of(const LowLatencyDispatchArgs& args) {
  if (args.casts) return {args.num_topk, int64_t{args.hidden}, args.hidden / layout::kFp8Group};
  return {args.num_topk, 2 * int64_t{args.hidden}, 0};
}

/// What ranks must pass alike, in one word; of a rank that takes no part, that.
[[nodiscard]] DEEPEP_HD uint32_t digest_of(const LowLatencyDispatchArgs& args) {
  if (args.refused) return absence_of(args);
  Digest digest;
  digest.add(static_cast<uint32_t>(args.max_tokens));
  digest.add(static_cast<uint32_t>(args.hidden));
  digest.add(static_cast<uint32_t>(args.num_local_experts));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add((args.casts ? 1u : 0u) | (args.rounds_scales ? 2u : 0u) | (args.packs_scales ? 4u : 0u));
  digest.add(args.weights_travel ? 1u : 0u);
  return digest.value | 1u;
}

struct LowLatencyDispatchCall {
  const LowLatencyDispatchArgs& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
  layout::LowLatencyMessage message;
  int begin;  // the block sends tokens [begin, end)
  int end;

  [[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchShared shared() const {
    return {g.num_ranks, args.num_local_experts};
  }
};

/// Clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall begin_call(const LowLatencyDispatchArgs& args,
                                                              uint32_t epoch) {
  using namespace dev;
  const layout::SplitOf<int> split{args.refused ? 0 : args.num_tokens, num_blocks()};
  const LowLatencyDispatchCall call{.args = args,
                                    .g = args.group,
                                    .epoch = epoch,
                                    .deadline = Deadline::in(args.group.timeout_ns),
                                    .message = message_of(args),
                                    .begin = split.begin(block()),
                                    .end = split.end(block())};
  if (thread() == 0) {
    SharedArray<uint32_t>(call.shared().failed()).set(0, 0);
    SharedArray<uint32_t>(call.shared().hash()).set(0, 0);
  }
  return call;
}

/// Of a launch that sends: reads the epoch.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall start(const LowLatencyDispatchArgs& args) {
  const uint32_t epoch = next_epoch(&args.group.state->dispatch_epoch);
  return begin_call(args, epoch);
}

/// Of a launch that only receives: the epoch is what its send has left.
[[nodiscard]] DEEPEP_DEVICE LowLatencyDispatchCall start_receive(const LowLatencyDispatchArgs& args) {
  return begin_call(args, dev::load_once(&args.group.state->dispatch_epoch));
}

DEEPEP_DEVICE void advance_epoch(const LowLatencyDispatchCall& call) {
  if (dev::thread() == 0) advance_epoch(call.g, &call.g.state->dispatch_epoch, call.epoch);
}

/// True on one thread of a block in which something was waited for in vain: it has a fault to report. A combine
/// along a dispatch that failed is refused, not made.
[[nodiscard]] DEEPEP_DEVICE bool finish(const LowLatencyDispatchCall& call) {
  using namespace dev;
  SharedArray<uint32_t> failed(call.shared().failed());
  sync_block();
  if (thread() != 0 || failed.get(0) == 0) return false;
  if (!call.args.refused) store<relaxed, gpu_scope>(call.args.handle.identity, 0u);
  return true;
}

}  // namespace deepep::kernels
