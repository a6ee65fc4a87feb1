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

/// Where this rank's digests for a rank are written, in whose slots their place is `offset`.
[[nodiscard]] DEEPEP_DEVICE uint64_t* digests_to(const LowLatencyCombineCall& call, int rank, int64_t offset) {
  return at<uint64_t>(call.g, rank, offset);
}

template <class Call>
DEEPEP_DEVICE void post_digest(const Call& call, int word, uint32_t value) {
  using namespace dev;
  const Group& g = call.g;
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (is_live(call, peer))
      store<relaxed, sys_scope>(digests_to(call, peer, call.args.slots.digests(call.epoch, g.rank)) + word,
                                pack_tagged(value, call.epoch));
}

/// By block 0.
template <class Call>
DEEPEP_DEVICE void post_shapes(const Call& call) {
  if (dev::block() == 0) {
    enter(call.lines, Step::kPost);
    post_digest(call, Digests::kShapes, call.args.share.digest);
  }
}

/// By block 0. Top-k indices that are not the dispatch's are refused.
template <class Call>
DEEPEP_DEVICE void post_indices(const Call& call) {
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

/// How long this rank waits for each other one to combine, where the caller wants to know.
template <class Call>
DEEPEP_DEVICE void measure_partners(const Call& call) {
  measure_waits(call, [&](int s) { return call.args.slots.digests(call.epoch, s) + 8 * Digests::kShapes; });
}

/// The same before weights are waited for, which come with the combine.
template <class Call>
DEEPEP_DEVICE void measure_owners(const Call& call) {
  if (!call.args.weights_travelled) measure_partners(call);
}

/// Waits for a source's digest number `word`, which comes to `offset`; notes a fault if it does not.
[[nodiscard]] DEEPEP_DEVICE bool wait_digest(const LowLatencyCombineCall& call, int64_t offset, int source, int,
                                             uint32_t& value) {
  return wait_word(call, offset, source, Phase::kCounts, value);
}

/// Before rows are summed: waits for both digests of all live ranks. All threads, with a barrier. False if this
/// rank sums none: ranks disagree, one is missing, or the call is made by other means; a fault is noted.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_partners(const Call& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> stopped(call.shared().stopped());
  enter(call.lines, Step::kWaitMetadata);
  if (args.weights_travelled || returns_entries(args)) measure_partners(call);
#pragma unroll 1
  for (int i = num_threads() - 1 - thread(); i < Digests::kCount * g.num_ranks; i += num_threads()) {
    const int word = i >= g.num_ranks ? Digests::kIndices : Digests::kShapes;
    const int source = word == Digests::kIndices ? i - g.num_ranks : i;
    if (!is_live(call, source)) continue;
    const uint32_t wanted = word == Digests::kShapes ? args.share.digest : dispatch_of(args);
    uint32_t value = 0;
    const int64_t offset = args.slots.digests(call.epoch, source) + 8 * word;
    if (!wait_digest(call, offset, source, word, value)) {
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    } else if (value != wanted || value == kRefusal) {
      note_fault(g, Phase::kDisagreement, 1u << source, wanted, value);
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    }
  }
  sync_block();
  return stopped.get(0) == 0 && !args.refused;
}

}  // namespace deepep::kernels
