// The kernel's side of rows that the copy engine returns: it rings the doorbell, and signals behind each chunk.
#pragma once

#include "kernels/combine/credit.hpp"
#include "kernels/combine/overwritten.hpp"

namespace deepep::kernels {

/// Block 0, warp 0: waits for the owners' credit and lets the engine begin; then raises the flags of a chunk's
/// rows when the engine has copied it. False without credit, or if the engine does not get on.
[[nodiscard]] DEEPEP_DEVICE bool drive_copy_engine(const CombineCall& call, const CombinePlan& plan) {
  using namespace dev;
  if (block() != 0 || warp() != 0) return true;
  const CombineArgs& args = call.args;
  const Group& g = call.g;
  const layout::Parts parts = plan.parts;
  const layout::StagingLayout& staging = args.staging;
  const auto count = call.counts();
  bool granted = wait_owners(call);
  if (lane() == 0) {
    if (!granted) post_overwrite_warning(g, call.epoch);
    store<release, sys_scope>(&g.state->ce_doorbell, args.copy_engine.last_ticket);  // the warnings come before
  }
  // Also if it serves nobody: x may be given to others once this kernel has ended.
  const Deadline deadline = Deadline::in(g.timeout_ns);
#pragma unroll 1
  for (int chunk = 0; chunk < args.copy_engine.chunks.num_chunks; ++chunk) {
    const uint32_t ticket =
        args.copy_engine.last_ticket - static_cast<uint32_t>(args.copy_engine.chunks.num_chunks - 1 - chunk);
    if (!wait_reached<relaxed, sys_scope>(&g.state->ce_completed, ticket, deadline)) {
      // No rank's doing.
      note_fault(g, Phase::kCopyEngine, 0, ticket, load<relaxed, sys_scope>(&g.state->ce_completed));
      granted = false;
    }
    granted = ballot(!granted) == 0;
    if (!granted) continue;
    fence<acq_rel, sys_scope>();  // what the engine has copied comes before the flags
    DEEPEP_ROLLED
    for (int d = 1; d < g.num_ranks; ++d) {
      const int owner = (g.rank + d) % g.num_ranks;
      if (!is_live(g, owner)) continue;
      const layout::RowRange rows = layout::chunk_of_rows(count, owner, g.rank, chunk, args.copy_engine.chunks);
      std::byte* flags = g.heap[owner] + g.staging_offset;
      for (uint32_t i = static_cast<uint32_t>(lane()); i < static_cast<uint32_t>(rows.rows) * parts.count;
           i += kWarpSize)
        store<relaxed, sys_scope>(
            reinterpret_cast<uint32_t*>(flags + staging.flag(rows.place + parts.row_of(i), parts.part_of(i))),
            call.epoch);
    }
  }
  return granted;
}

/// Before a fault is reported: one thread waits until the engine is done, or notes that it does not get on. No
/// record may leave without that: a rank that goes on, as after a disagreement, must have no copies under way.
DEEPEP_DEVICE void wait_copy_engine(const CombineArgs& args) {
  using namespace dev;
  const Group& g = args.group;
  // The doorbell rings within one time-out, and the engine has another.
  const Deadline deadline = Deadline::in(2 * g.timeout_ns);
  const auto missing = [&] {
    return static_cast<int32_t>(args.copy_engine.last_ticket -
                                load<relaxed, sys_scope>(&g.state->ce_completed)) > 0;
  };
  while (missing() && !deadline.passed()) pause();
  if (missing()) note_fault(g, Phase::kCopyEngine, 0, args.copy_engine.last_ticket, 0);
}

}  // namespace deepep::kernels
