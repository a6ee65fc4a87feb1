// Credit for the owners' staging: one warp of a block waits for it, and shares it with those that push.
#pragma once

#include "kernels/combine/call.hpp"

namespace deepep::kernels {

/// The word that the credit warp shares with its block.
inline constexpr uint32_t kGranted = 1;
inline constexpr uint32_t kNoCredit = 0xffffffffu;

/// Waits until every owner's staging is free, a lane an owner. Whole warps: the lanes' acquires come before the
/// whole warp's stores.
[[nodiscard]] DEEPEP_DEVICE bool wait_owners(const CombineCall& call) {
  using namespace dev;
  const Group& g = call.g;
  bool free = true;
  if (lane() < g.num_ranks && lane() != g.rank && is_live(g, lane())) {
    const uint32_t* word = at<uint32_t>(g, g.rank, g.control.staging_free(lane()));
    // An owner that gets nothing from this rank does not wait for it, and may be further already.
    free = wait_reached<acquire, sys_scope>(word, call.epoch - 1, call.deadline);
    if (!free) note_fault(g, Phase::kStaging, 1u << lane(), call.epoch - 1, load<relaxed, sys_scope>(word));
  }
  sync_warp();
  return ballot(!free) == 0;
}

/// The credit warp: waits for the owners' credit, and shares it with its block. While it waits the block's rows
/// come to the registers of those that push them. False if an owner has not granted it.
[[nodiscard]] DEEPEP_DEVICE bool wait_credit(const CombineCall& call, const CombinePlan& plan) {
  using namespace dev;
  if (warp() != plan.role.credit_warp) return true;
  enter(call.lines, Step::kWaitCredit);
  const bool granted = wait_owners(call);
  SharedArray<uint32_t> credit(CombineShared{call.g.num_ranks}.credit());
  if (lane() == 0) credit.set<release>(0, granted ? kGranted : kNoCredit);
  return granted;
}

/// Waits for the credit warp of the block: that has a deadline. Whole warps.
[[nodiscard]] DEEPEP_DEVICE bool has_shared_credit(const Group& g) {
  using namespace dev;
  SharedArray<uint32_t> credit(CombineShared{g.num_ranks}.credit());
  uint32_t seen = 0;
  if (lane() == 0)
    while ((seen = credit.get<acquire>(0)) == 0) pause();
  sync_warp();  // the acquire comes before the whole warp's stores
  return shuffle(seen, 0) == kGranted;
}

}  // namespace deepep::kernels
