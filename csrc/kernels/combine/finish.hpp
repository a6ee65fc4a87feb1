// The end of a block of a combine.
#pragma once

#include "kernels/combine/overwritten.hpp"

namespace deepep::kernels {

/// True on one thread of a block in which something was waited for in vain, or which has summed (`has_reduced`)
/// what a peer may have written over: it has a fault to report. `succeeded`: of each warp.
[[nodiscard]] DEEPEP_DEVICE bool finish(const CombineCall& call, bool has_reduced, bool succeeded) {
  using namespace dev;
  SharedArray<uint32_t> failed(CombineShared{call.g.num_ranks}.failed());
  if (!succeeded && lane() == 0) failed.bit_or(0, 1u);
  enter(call.lines, Step::kFinish);
  sync_block();
  enter(call.lines, Step::kEnd);
  if (warp() != 0) return false;
  const bool is_spoiled = has_reduced && is_overwritten(call.g);
  return lane() == 0 && (is_spoiled || failed.get(0) != 0);
}

}  // namespace deepep::kernels
