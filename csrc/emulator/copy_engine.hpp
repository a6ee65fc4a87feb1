// A rank's copy engine, as the kernels meet it: it does what the host has put on its stream for a combine. It
// runs as the kernel of a rank of its own.
#pragma once

#include <cstring>

#include "kernels/common/group.hpp"

namespace deepep::emu {

struct CopyEngineArgs {
  kernels::CombineArgs combine;
  uint64_t patience_ns;  // a real one waits indefinitely, but its process may end
};

/// One stretch of `rows` rows of `bytes`. In a call whose flags nobody will raise it is carried behind the
/// machine's back: what meets it would be a race, and is allowed as long as nobody uses what comes of it.
DEEPEP_DEVICE void carry(std::byte* to, const std::byte* from, int64_t rows, int64_t bytes, bool spoils) {
  using namespace dev;
  if (spoils) {
    if (lane() == 0) std::memset(to, 0x5a, static_cast<size_t>(rows * bytes));
    return;
  }
  auto* target = reinterpret_cast<uint32_t*>(to);
  const auto* source = reinterpret_cast<const uint32_t*>(from);
  for (int64_t i = lane(); i < rows * bytes / 4; i += kWarpSize) store(target + i, load(source + i));
}

/// A copy of a ring's. broken: this rank's word, behind which the copy is of what nobody may use: what a sender
/// brings then is carried behind the machine's back, and a receiver's copy reads nothing.
struct RingCopyArgs {
  const std::byte* from;
  std::byte* to;
  int64_t bytes;
  const uint32_t* broken;
  bool sends;
};

DEEPEP_KERNEL(ring_copy_kernel, RingCopyArgs, 32) {
  using namespace dev;
  const bool spoils = load(args.broken) != 0;
  if (spoils && args.sends && lane() == 0) std::memset(args.to, 0x5a, static_cast<size_t>(args.bytes));
  if (spoils) return;
  for (int64_t i = lane(); i < args.bytes; i += kWarpSize) store(args.to + i, load(args.from + i));
}

DEEPEP_KERNEL(copy_engine_kernel, CopyEngineArgs, 32) {
  using namespace dev;
  const kernels::CombineArgs& call = args.combine;
  const kernels::Group& g = call.group;
  const kernels::CopyEngineWork& work = call.copy_engine;
  const layout::StagingLayout& staging = call.staging;
  const auto first = work.last_ticket - static_cast<uint32_t>(work.chunks.num_chunks - 1);
  const bool goes = lane() == 0 && wait_reached<acquire, sys_scope>(&g.state->ce_doorbell, work.last_ticket,
                                                                    Deadline::in(args.patience_ns));
  if (ballot(goes) == 0) return;
  sync_warp();  // lane 0's acquire comes before what the warp reads
  const layout::CountMatrix count{call.counts, g.num_ranks};
  bool spoils = false;  // not all owners had lent their staging
  for (int owner = 0; owner < g.num_ranks; ++owner)
    if (owner != g.rank && kernels::is_live(g, owner))
      spoils |= load<relaxed, sys_scope>(kernels::at<uint32_t>(g, owner, g.control.overwritten(g.rank))) != 0;
  for (int chunk = 0; chunk < work.chunks.num_chunks; ++chunk) {
    for (int owner = 0; owner < g.num_ranks; ++owner) {
      if (owner == g.rank || !kernels::is_live(g, owner)) continue;
      const layout::RowRange rows = layout::chunk_of_rows(count, owner, g.rank, chunk, work.chunks);
      std::byte* area = g.heap[owner] + g.staging_offset;
      carry(area + staging.row(rows.place), call.x + rows.row * call.row_bytes, rows.rows, call.row_bytes,
            spoils);
      carry(area + staging.weights(rows.place),
            reinterpret_cast<const std::byte*>(call.topk_weights) + rows.row * staging.weight_bytes(),
            rows.rows, staging.weight_bytes(), spoils);
    }
    sync_warp();
    if (lane() == 0) store<release, sys_scope>(&g.state->ce_completed, first + static_cast<uint32_t>(chunk));
  }
}

}  // namespace deepep::emu
