// Rows that the copy engine returns, while all SMs sum: the kernel's side of it.
//
//   begin     one warp waits until all owners have lent their staging, then lets the engine begin
//   follow    behind each chunk that the engine says it has carried, the warp raises the flags of its rows
//   look      a block that has summed looks whether a peer may have written to the staging meanwhile
//
// What the engine is to do stands on a stream, and nobody can take it back. So where an owner has not lent its staging
// in time, the engine writes there all the same, and the owner is told before it does. It looks for that word behind
// its sums: if it is not there, all that it read was there before the engine began.
#pragma once

#include "kernels/combine/sum.hpp"

namespace deepep::kernels {

/// Whether `owner` has lent its staging for the combine with this epoch, as far as can be seen without waiting.
[[nodiscard]] DEEPEP_DEVICE bool has_lent(const Group& g, int owner, uint32_t epoch) {
  using namespace dev;
  const uint32_t free = load<relaxed, sys_scope>(at<uint32_t>(g, g.rank, g.control.staging_free(owner)));
  return static_cast<int32_t>(free - (epoch - 1)) >= 0;
}

/// Tells those who have not lent their staging that it may be written all the same. One thread.
DEEPEP_DEVICE void tell_overwritten(const Group& g, uint32_t epoch) {
  using namespace dev;
  DEEPEP_ROLLED
  for (int owner = 0; owner < g.num_ranks; ++owner)
    if (owner != g.rank && is_live(g, owner) && !has_lent(g, owner, epoch))
      store<relaxed, sys_scope>(at<uint32_t>(g, owner, g.control.overwritten(g.rank)), epoch);
}

/// begin and follow. `lent`: whether all owners have lent their staging. False if not, or if the engine does not get
/// on. One warp.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE bool follow_engine(const CombineArgs& args, const Count& count, bool lent, layout::Parts parts,
                                               uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  const layout::StagingLayout& staging = args.staging;
  if (lane() == 0) {
    if (!lent) tell_overwritten(g, epoch);
    store<release, sys_scope>(&g.state->ce_doorbell, args.copy_engine.last_ticket);  // what was told comes before
  }
  // Also if it serves nobody: x may be given to others once this kernel has ended.
  const Deadline deadline = Deadline::in(g.timeout_ns);
#pragma unroll 1
  for (int chunk = 0; chunk < args.copy_engine.chunks.num_chunks; ++chunk) {
    const uint32_t ticket = args.copy_engine.last_ticket - static_cast<uint32_t>(args.copy_engine.chunks.num_chunks - 1 - chunk);
    if (!wait_reached<relaxed, sys_scope>(&g.state->ce_completed, ticket, deadline)) {
      note_fault(g, Phase::kCopyEngine, 0, ticket, load<relaxed, sys_scope>(&g.state->ce_completed));  // no rank's doing
      lent = false;
    }
    lent = ballot(!lent) == 0;
    if (!lent) continue;
    fence<acq_rel, sys_scope>();  // what the engine has carried comes before the flags
    DEEPEP_ROLLED
    for (int d = 1; d < g.num_ranks; ++d) {
      const int owner = (g.rank + d) % g.num_ranks;
      if (!is_live(g, owner)) continue;
      const layout::RowRange rows = layout::chunk_of_rows(count, owner, g.rank, chunk, args.copy_engine.chunks);
      std::byte* flags = g.heap[owner] + g.staging_offset;
      for (uint32_t i = static_cast<uint32_t>(lane()); i < static_cast<uint32_t>(rows.rows) * parts.count; i += kWarpSize)
        store<relaxed, sys_scope>(
            reinterpret_cast<uint32_t*>(flags + staging.flag(rows.place + parts.row_of(i), parts.part_of(i))), epoch);
    }
  }
  return lent;
}

/// Before a fault is handed over: one thread waits until the engine is done, or notes that it does not get on. No record
/// may leave without that: a rank that goes on, as after a disagreement, must have no copies under way.
DEEPEP_DEVICE void await_engine(const CombineArgs& args) {
  using namespace dev;
  const Group& g = args.group;
  // It is let go within one time-out, and given another.
  const Deadline deadline = Deadline::in(2 * g.timeout_ns);
  const auto missing = [&] {
    return static_cast<int32_t>(args.copy_engine.last_ticket - load<relaxed, sys_scope>(&g.state->ce_completed)) > 0;
  };
  while (missing() && !deadline.passed()) pause();
  if (missing()) note_fault(g, Phase::kCopyEngine, 0, args.copy_engine.last_ticket, 0);
}

/// look: whether the staging may have been written while this rank read it; a fault is noted. One warp, behind a block
/// barrier that follows the block's sums.
[[nodiscard]] DEEPEP_DEVICE bool is_overwritten(const Group& g) {
  using namespace dev;
  uint32_t since = 0;
  if (lane() < g.num_ranks && lane() != g.rank && is_live(g, lane()))
    since = load<relaxed, sys_scope>(at<uint32_t>(g, g.rank, g.control.overwritten(lane())));
  const uint32_t who = ballot(since != 0);
  if (who == 0) return false;
  since = shuffle(since, lowest_bit(who));
  if (lane() == 0) note_fault(g, Phase::kOverwritten, who, 0, since);  // by the thread that hands over what was noted
  return true;
}

}  // namespace deepep::kernels
