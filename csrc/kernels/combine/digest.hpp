// Whether all ranks combine the same: a digest from every rank to every rank.
#pragma once

#include "kernels/combine/call.hpp"
#include "kernels/common/waits.hpp"

namespace deepep::kernels {

/// The digest of what all ranks must pass alike: row size, top-k, live ranks, and the counts of the handle.
/// Whole warps.
[[nodiscard]] DEEPEP_DEVICE uint32_t digest_of(const CombineCall& call) {
  using namespace dev;
  const CombineArgs& args = call.args;
  const auto count = call.counts();
  Digest row;  // of lane s: what rank s sends
  row.add(static_cast<uint32_t>(lane()));
  DEEPEP_ROLLED
  for (int d = 0; d < args.group.num_ranks; ++d)
    if (lane() < args.group.num_ranks) row.add(static_cast<uint32_t>(count(lane(), d)));
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(args.group.live);
  digest.add(static_cast<uint32_t>(warp_sum(static_cast<int>(row.value >> 5))));  // the sum of 32 fits
  return digest.value | 1u;
}

/// Block 0, one warp: this rank's digest to every live rank. It needs nothing but itself, so it needs no order.
DEEPEP_DEVICE void post_digest(const CombineCall& call, uint32_t digest) {
  using namespace dev;
  const Group& g = call.g;
  if (lane() < g.num_ranks && is_live(g, lane()))
    store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_digest(g.rank, call.epoch)),
                              pack_tagged(digest, call.epoch));
}
DEEPEP_DEVICE void post_digest(const CombineCall& call) {
  if (posts_digest() && dev::block() == 0) {
    enter(call.lines, Step::kPost);
    post_digest(call, digest_of(call));
  }
}
DEEPEP_DEVICE void post_refusal(const CombineCall& call) {
  if (posts_digest() && dev::block() == 0) post_digest(call, kRefusal);
}

/// The warp of a launch whose waits are measured, where somebody wants to know: one that sums, and has not the
/// whole block's flags to raise before.
[[nodiscard]] DEEPEP_DEVICE bool measures_waits(const Group& g) {
  return g.waits != nullptr && dev::warp() == dev::num_warps() - 2 && dev::block() == dev::num_blocks() - 1;
}

DEEPEP_DEVICE void measure_digests(const CombineCall& call) {
  using namespace dev;
  const Group& g = call.g;
  if (!measures_waits(g)) return;
  measure_wait(sums_of(g, Waited::kDigest), has_peer(g), call.deadline, [&] {
    const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_digest(lane(), call.epoch));
    return unpack_tagged(load<relaxed, sys_scope>(word)).tag == call.epoch;
  });
}

/// Whether all live ranks combine the same as this one, whose digest is given; nobody does if that is a
/// refusal. Whole warps.
[[nodiscard]] DEEPEP_DEVICE bool wait_digests(const CombineCall& call, uint32_t digest) {
  using namespace dev;
  const Group& g = call.g;
  bool agrees = true;
  if (lane() < g.num_ranks && is_live(g, lane())) {
    const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_digest(lane(), call.epoch));
    uint32_t seen = 0;
    if (!wait_tag<relaxed, sys_scope>(word, call.epoch, call.deadline, seen)) {
      note_fault(g, Phase::kReturn, 1u << lane(), call.epoch,
                 unpack_tagged(load<relaxed, sys_scope>(word)).tag);
      agrees = false;
    } else if (seen != digest || digest == kRefusal) {
      note_fault(g, Phase::kDisagreement, 1u << lane(), digest, seen);
      agrees = false;
    }
  }
  return ballot(!agrees) == 0;
}

}  // namespace deepep::kernels
