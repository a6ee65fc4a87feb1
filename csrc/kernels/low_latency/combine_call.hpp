// A low-latency combine as its blocks see it: the call, its shared memory, how a launch begins and ends.
#pragma once

#include "kernels/low_latency/common.hpp"

namespace deepep::kernels {

/// The block's dynamic shared memory.
struct LowLatencyCombineShared {
  int num_ranks;
  int token_words;

  [[nodiscard]] DEEPEP_HD int64_t failed() const { return 0; }  // uint32: bits of Phases
  /// The same of the waits for digests alone, before rows are weighted and before they are summed: what one has
  /// found is read while the other may find something.
  [[nodiscard]] DEEPEP_HD int64_t stopped_owners() const { return 4; }
  [[nodiscard]] DEEPEP_HD int64_t stopped_partners() const { return 8; }
  [[nodiscard]] DEEPEP_HD int64_t hash() const { return 12; }  // uint32
  /// uint32 [R, token words]: tokens that came from each source, as bits.
  [[nodiscard]] DEEPEP_HD int64_t tokens() const { return 16; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return layout::align_up(tokens() + 4 * num_ranks * token_words, 16);
  }
};

[[nodiscard]] DEEPEP_HD LowLatencyCombineShared shared_of(const LowLatencyCombineArgs& args) {
  return {args.group.num_ranks, (args.max_tokens + 31) / 32};
}

struct LowLatencyCombineCall {
  const LowLatencyCombineArgs& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;

  [[nodiscard]] DEEPEP_DEVICE LowLatencyCombineShared shared() const { return shared_of(args); }
};

/// Clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall begin_call(const LowLatencyCombineArgs& args,
                                                             uint32_t epoch) {
  using namespace dev;
  const LowLatencyCombineCall call{args, args.group, epoch, Deadline::in(args.group.timeout_ns)};
  if (thread() == 0) {
    SharedArray<uint32_t>(call.shared().failed()).set(0, 0);
    SharedArray<uint32_t>(call.shared().stopped_owners()).set(0, 0);
    SharedArray<uint32_t>(call.shared().stopped_partners()).set(0, 0);
    SharedArray<uint32_t>(call.shared().hash()).set(0, 0);
  }
  return call;
}

/// The epoch of the call before.
[[nodiscard]] DEEPEP_DEVICE uint32_t last_epoch(const LowLatencyCombineArgs& args) {
  return dev::load(&args.group.state->combine_epoch);
}

/// Of a launch that sends. All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall start(const LowLatencyCombineArgs& args, uint32_t last) {
  using namespace dev;
  const uint32_t epoch = next_epoch(last);
  const LowLatencyCombineCall call = begin_call(args, epoch);
  sync_block();
  return call;
}

/// Of a launch that only receives: the epoch is what its send has left.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall start_receive(const LowLatencyCombineArgs& args) {
  return begin_call(args, dev::load_once(&args.group.state->combine_epoch));
}

DEEPEP_DEVICE void advance_epoch(const LowLatencyCombineCall& call) {
  advance_epoch(call, &call.g.state->combine_epoch);
}

/// True on one thread of a block in which something was waited for in vain, or that has found a disagreement:
/// it has a fault to report.
[[nodiscard]] DEEPEP_DEVICE bool finish(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineShared shared = call.shared();
  sync_block();
  if (thread() != 0) return false;
  uint32_t phases = 0;
  for (const int64_t word : {shared.failed(), shared.stopped_owners(), shared.stopped_partners()})
    phases |= SharedArray<uint32_t>(word).get(0);
  return phases != 0;
}

}  // namespace deepep::kernels
