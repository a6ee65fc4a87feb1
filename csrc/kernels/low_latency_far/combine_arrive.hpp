// Rows from other domains: what a combine's sums wait for, and what it waits for in any case.
#pragma once

#include "kernels/low_latency_far/combine_call.hpp"

namespace deepep::kernels {

/// A far rank that has not made all rows has made none for this rank.
[[nodiscard]] DEEPEP_DEVICE bool wait_return(const FarCombineCall& call, const uint32_t* flag, int source) {
  using namespace dev;
  if (is_mapped(call, source)) return wait_return(call.near(), flag, source);
  if (!wait_put(call, FarPut::kReturns, source, Phase::kReturn)) return false;
  const uint32_t made = load(arrived_at<uint32_t>(call.far, call.turn, source, call.far.slots.returns()));
  if (made == call.epoch) return true;
  note_fault(call.g, Phase::kReturn, 1u << source, call.epoch, made);
  return false;
}

/// All far ranks' rows are here, whether or not they were summed: who posts the next combine's digests says
/// with them that all puts of this one have arrived. By block 0; and by each block that has found a
/// disagreement: the first to report that must know of a rank that is missing as well, or the host would go on.
DEEPEP_DEVICE void await_returns(const FarCombineCall& call) {
  using namespace dev;
  const bool has_stopped = SharedArray<uint32_t>(call.shared().stopped()).get(0) != 0;
  if ((block() != 0 && !has_stopped) || warp() != 0 || !puts_to(call, lane())) return;
  if (!wait_put(call, FarPut::kReturns, lane(), Phase::kReturn))
    SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kReturn));
}

}  // namespace deepep::kernels
