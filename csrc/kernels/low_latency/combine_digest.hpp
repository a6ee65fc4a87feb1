// Whether ranks combine alike: each posts what must be the same everywhere, then whether its top-k indices are
// those of the dispatch; and nobody sums before it has seen everybody's.
#pragma once

#include "kernels/low_latency/combine_call.hpp"

namespace deepep::kernels {

using Digests = layout::LowLatencyDigests;

/// What this rank's second word says: along which dispatch it combines. Of one that failed none does.
[[nodiscard]] DEEPEP_DEVICE uint32_t dispatch_of(const LowLatencyCombineArgs& args) {
  if (args.refused) return absence_of(args);
  const uint32_t epoch = dev::load_once(args.handle.identity);
  return epoch == 0 ? kRefusal : epoch | 1u << 31;
}

DEEPEP_DEVICE void post_digest(const LowLatencyCombineCall& call, int word, uint32_t value) {
  using namespace dev;
  const Group& g = call.g;
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (is_live(call, peer))
      store<relaxed, sys_scope>(at<uint64_t>(g, peer, call.args.slots.digests(call.epoch, g.rank)) + word,
                                pack_tagged(value, call.epoch));
}

/// By block 0.
DEEPEP_DEVICE void post_shapes(const LowLatencyCombineCall& call) {
  if (dev::block() == 0) post_digest(call, Digests::kShapes, call.args.share.digest);
}

/// By block 0. Top-k indices that are not the dispatch's are refused.
DEEPEP_DEVICE void post_indices(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  if (block() != 0) return;
  SharedArray<uint32_t> hash(call.shared().hash());
  if (!args.refused) hash_topk(args, args.weights_travelled, call.shared().hash());
  sync_block();
  uint32_t value = dispatch_of(args);
  if (!args.refused && load_once(args.handle.identity + 1) != hash.get(0)) value = kRefusal;
  post_digest(call, Digests::kIndices, value);
}

/// Words [first, end) of the digests of all live ranks; `found`: the word of shared memory for what is wrong.
/// All threads, with a barrier. The phases of what was wrong on all if one does not come or disagrees; a fault
/// is noted.
[[nodiscard]] DEEPEP_DEVICE uint32_t wait_digests(const LowLatencyCombineCall& call, int first, int end,
                                                  int64_t found) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> stopped(found);
  // Once in a call: where weights come, before they are looked for.
  if (end == Digests::kIndices || args.weights_travelled || returns_entries(args))
    measure_waits(call, [&](int s) { return args.slots.digests(call.epoch, s) + 8 * Digests::kShapes; });
#pragma unroll 1
  for (int i = num_threads() - 1 - thread(); i < (end - first) * g.num_ranks; i += num_threads()) {
    const bool is_second = i >= g.num_ranks;
    const int source = is_second ? i - g.num_ranks : i;
    const int word = first + (is_second ? 1 : 0);
    if (!is_live(call, source)) continue;
    const uint32_t wanted = word == Digests::kShapes ? args.share.digest : dispatch_of(args);
    uint32_t value = 0;
    const int64_t offset = args.slots.digests(call.epoch, source) + 8 * word;
    if (!wait_word(call, offset, source, Phase::kCounts, value)) {
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      SharedArray<uint32_t>(call.shared().lost()).bit_or(0, 1u << source);
    } else if (value != wanted || value == kRefusal) {
      note_fault(g, Phase::kDisagreement, 1u << source, wanted, value);
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    }
  }
  sync_block();
  return stopped.get(0);
}

/// Before rows are weighted, where weights come with the combine: a rank that refuses posts none. Else all is
/// looked at behind the rows. False if this rank weights none; with masks it does for those that are there.
[[nodiscard]] DEEPEP_DEVICE bool wait_owners(const LowLatencyCombineCall& call) {
  if (call.args.weights_travelled) return true;
  uint32_t found = wait_digests(call, Digests::kShapes, Digests::kIndices, call.shared().stopped_owners());
  if (call.masks) found &= ~static_cast<uint32_t>(Phase::kCounts);
  return found == 0 && !call.args.refused;
}

/// Before rows are summed. False if this rank sums none: ranks disagree, one is missing, or the call is made by
/// other means.
[[nodiscard]] DEEPEP_DEVICE bool wait_partners(const LowLatencyCombineCall& call) {
  const uint32_t found =
      wait_digests(call, Digests::kShapes, Digests::kCount, call.shared().stopped_partners());
  return found == 0 && !call.args.refused;
}

}  // namespace deepep::kernels
