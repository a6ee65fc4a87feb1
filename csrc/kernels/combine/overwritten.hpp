// Staging that was written without credit. What a copy engine is to do stands on a stream, and nobody can take
// it back: where an owner has not granted credit in time, the engine writes there all the same, and the owner
// is warned before it does. It looks for the warning behind its sums: if there is none, all that it read was
// there before the engine began.
#pragma once

#include "kernels/combine/call.hpp"

namespace deepep::kernels {

/// Whether `owner` has granted credit for the combine with this epoch, as far as can be seen without waiting.
[[nodiscard]] DEEPEP_DEVICE bool has_credit(const Group& g, int owner, uint32_t epoch) {
  using namespace dev;
  const uint32_t free = load<relaxed, sys_scope>(at<uint32_t>(g, g.rank, g.control.staging_free(owner)));
  return static_cast<int32_t>(free - (epoch - 1)) >= 0;
}

/// Warns those who have not granted credit that their staging may be written all the same. One thread.
DEEPEP_DEVICE void post_overwrite_warning(const Group& g, uint32_t epoch) {
  using namespace dev;
  DEEPEP_ROLLED
  for (int owner = 0; owner < g.num_ranks; ++owner)
    if (owner != g.rank && is_live(g, owner) && !has_credit(g, owner, epoch))
      store<relaxed, sys_scope>(at<uint32_t>(g, owner, g.control.overwritten(g.rank)), epoch);
}

/// Whether the staging may have been written while this rank read it; a fault is noted. One warp, behind a
/// block barrier that follows the block's sums.
[[nodiscard]] DEEPEP_DEVICE bool is_overwritten(const Group& g) {
  using namespace dev;
  uint32_t since = 0;
  if (lane() < g.num_ranks && lane() != g.rank && is_live(g, lane()))
    since = load<relaxed, sys_scope>(at<uint32_t>(g, g.rank, g.control.overwritten(lane())));
  const uint32_t who = ballot(since != 0);
  if (who == 0) return false;
  since = shuffle(since, lowest_bit(who));
  if (lane() == 0) note_fault(g, Phase::kOverwritten, who, 0, since);  // by the thread that reports it
  return true;
}

}  // namespace deepep::kernels
