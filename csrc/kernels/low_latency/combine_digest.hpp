// Whether ranks combine alike: each posts a digest before it sends, and nobody sums before it has seen
// everybody's.
#pragma once

#include "kernels/low_latency/combine_call.hpp"

namespace deepep::kernels {

/// What ranks must pass alike, in one word.
[[nodiscard]] DEEPEP_HD uint32_t digest_of(const LowLatencyCombineArgs& args, uint32_t dispatch_epoch) {
  Digest digest;
  digest.add(static_cast<uint32_t>(args.max_tokens));
  digest.add(static_cast<uint32_t>(args.hidden));
  digest.add(static_cast<uint32_t>(args.num_local_experts));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(args.weights_travelled ? 1u : 0u);
  digest.add(dispatch_epoch);
  return digest.value | 1u;
}

/// The digest of this rank, as far as it can be known without a hash of the top-k indices.
[[nodiscard]] DEEPEP_DEVICE uint32_t own_digest(const LowLatencyCombineArgs& args) {
  return args.refused ? absence_of(args) : digest_of(args, dev::load_once(args.handle.identity));
}

/// By block 0. Refuses if the top-k indices are not those of the dispatch, or that has failed.
DEEPEP_DEVICE void post_digest(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  if (block() != 0) return;
  SharedArray<uint32_t> hash(call.shared().hash());
  if (!args.refused) hash.add(0, hash_topk(args, args.weights_travelled));
  sync_block();
  uint32_t digest = own_digest(args);
  if (!args.refused &&
      (load_once(args.handle.identity) == 0 || load_once(args.handle.identity + 1) != hash.get(0)))
    digest = kRefusal;
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (is_live(g, peer))
      store<relaxed, sys_scope>(at<uint64_t>(g, peer, args.slots.digest(call.epoch, g.rank)),
                                pack_tagged(digest, call.epoch));
}

/// The digests of all live ranks. All threads, with a barrier. False on all if one does not come or disagrees;
/// a fault is noted. False, too, if the call is made by other means.
[[nodiscard]] DEEPEP_DEVICE bool wait_digests(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> stopped(call.shared().stopped());
  const uint32_t digest = own_digest(args);
#pragma unroll 1
  for (int source = thread(); source < g.num_ranks; source += num_threads()) {
    if (!is_live(g, source)) continue;
    uint32_t value = 0;
    const int64_t offset = args.slots.digest(call.epoch, source);
    if (!wait_word(g, offset, source, Phase::kCounts, call.epoch, call.deadline, value)) {
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    } else if (value != digest || value == kRefusal) {
      note_fault(g, Phase::kDisagreement, 1u << source, digest, value);
      stopped.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    }
  }
  sync_block();
  return stopped.get(0) == 0 && !args.refused;
}

/// Where weights come with the combine, digests are looked at before them: a rank that refuses posts none.
[[nodiscard]] DEEPEP_DEVICE bool wait_owners(const LowLatencyCombineCall& call) {
  return call.args.weights_travelled || wait_digests(call);
}

}  // namespace deepep::kernels
