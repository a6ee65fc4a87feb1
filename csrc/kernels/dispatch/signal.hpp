// The flags behind a dispatch's rows, and the wait for those of the peers.
#pragma once

#include "kernels/common/waits.hpp"
#include "kernels/dispatch/call.hpp"

namespace deepep::kernels {

/// This push block's rows are at every peer. Its threads' stores come before its flags: the block barrier
/// orders them before the releasing thread, and the release carries them along.
DEEPEP_DEVICE void signal_rows(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  if (!share.role.push) return;
  enter(call.lines, Step::kSignal);
  const Group& g = call.g;
  const int flag = block() - first_push_block(call.args);
  sync_block();
  for (int d = thread(); d < g.num_ranks; d += num_threads()) {
    if (d == g.rank || !is_live(g, d)) continue;
    store<release, sys_scope>(at<uint32_t>(g, d, g.control.rows_done(g.rank)) + flag, call.epoch);
  }
}

/// The last block waits for the flags of all peers' push blocks. One thread a flag, so no order among peers.
DEEPEP_DEVICE void wait_rows(const DispatchCall& call) {
  using namespace dev;
  if (block() != num_blocks() - 1) return;
  enter(call.lines, Step::kWaitRows);
  const Group& g = call.g;
  const MetadataShared shared{g.num_ranks};
  SharedArray<uint32_t> push_blocks(shared.push_blocks());
  SharedArray<uint32_t> failed(shared.failed());
  for (int source = warp(); source < g.num_ranks; source += num_warps()) {
    if (source == g.rank || !is_live(g, source)) continue;
    const uint64_t begin = g.waits == nullptr ? 0 : clock_ns();
    for (int flag = lane(); flag < static_cast<int>(push_blocks.get(source)); flag += kWarpSize) {
      const uint32_t* done = at<uint32_t>(g, g.rank, g.control.rows_done(source)) + flag;
      if (wait_equal<acquire, sys_scope>(done, call.epoch, call.deadline)) continue;
      note_fault(g, Phase::kRows, 1u << source, call.epoch, load<relaxed, sys_scope>(done));
      failed.bit_or(0, static_cast<uint32_t>(Phase::kRows));
    }
    if (g.waits == nullptr) continue;
    sync_warp();
    int64_t* sum = sums_of(g, Waited::kDispatchRows) + source;
    if (lane() == 0) store(sum, load(sum) + static_cast<int64_t>(clock_ns() - begin));
  }
}

}  // namespace deepep::kernels
