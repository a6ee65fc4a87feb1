// The rows of a two-level dispatch, in items that blocks claim, and its end.
#pragma once

#include "kernels/two_level/forward.hpp"
#include "kernels/two_level/metadata.hpp"
#include "kernels/two_level/near.hpp"
#include "kernels/two_level/save_counts.hpp"
#include "kernels/two_level/send.hpp"

namespace deepep::kernels {

/// The items of a call: stage by stage, in each the sending of window k, a chunk of it to each other domain
/// after the other; the rows of window k that stay; and the spreading of the peers' windows k - 1. To send
/// window k waits for the spreading of window k - 2; to spread window k - 1, for its sending: both in stages
/// before.
struct DispatchItems {
  int chunks;
  int num_out;
  int num_in;

  [[nodiscard]] DEEPEP_DEVICE uint32_t a_stage() const {
    return static_cast<uint32_t>((num_out + 1 + num_in) * chunks);
  }
};

[[nodiscard]] DEEPEP_DEVICE int64_t num_stages(const TwoLevelDispatchCall& call) {
  int64_t most = windows_of(call.two_level, call.args.dispatch.num_tokens);
  DEEPEP_ROLLED
  for (int i = 0; i < call.two_level.rails.num_in; ++i) {
    const int source = call.two_level.rails.peer[call.two_level.rails.in[i]];
    most = layout::max_of(most, windows_of(call.two_level, tokens_of(call, source)));
  }
  return most + 1;
}

/// Whole block. False if something was waited for in vain, which is noted.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE bool move_rows(const TwoLevelDispatchCall& call) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const DispatchItems items{num_chunks(two_level), two_level.rails.num_out, two_level.rails.num_in};
  const uint32_t a_stage = items.a_stage();
  const auto num_items = static_cast<uint32_t>(num_stages(call)) * a_stage;
  const int64_t shared = shared_of(call.args).items();
  const bool done =
      work_on_items(two_level, shared, num_items, [&](uint32_t item, const ItemTurn& turn) {
        const int64_t stage = item / a_stage;
        const int what = static_cast<int>(item % a_stage) / items.chunks;
        const int chunk = static_cast<int>(item % a_stage) % items.chunks;
        if (what < items.num_out) return send_chunk<kCached>(call, turn, what, stage, chunk);
        if (what == items.num_out) return write_near<kCached>(call, stage, chunk);
        return forward_chunk(call, turn, what - items.num_out - 1, stage - 1, chunk);
      });
  if (!done && thread() == 0)
    SharedArray<uint32_t>(MetadataShared{call.near.g.num_ranks}.failed()).bit_or(0, uint32_t(Phase::kRows));
  return done;
}

/// The flags behind this block's rows: as in one level. A block that has waited in vain (`moved` is false)
/// raises none: rows that it was to spread are not there.
DEEPEP_DEVICE void signal_rows(const TwoLevelDispatchCall& call, const WarpShare& share, bool moved) {
  if (moved) signal_rows(call.near, share);
}

/// The last block waits for the flags of all neighbours' blocks. One thread a flag.
DEEPEP_DEVICE void wait_rows(const TwoLevelDispatchCall& call) {
  using namespace dev;
  if (block() != num_blocks() - 1) return;
  const Group& g = call.near.g;
  const MetadataShared near{g.num_ranks};
  SharedArray<uint32_t> push_blocks(near.push_blocks());
  SharedArray<uint32_t> failed(near.failed());
  for (int local = warp(); local < g.num_ranks; local += num_warps()) {
    if (local == g.rank || !is_live(g, local)) continue;
    for (int flag = lane(); flag < static_cast<int>(push_blocks.get(local)); flag += kWarpSize) {
      const uint32_t* done = at<uint32_t>(g, g.rank, g.control.rows_done(local)) + flag;
      if (wait_equal<acquire, sys_scope>(done, call.near.epoch, call.near.deadline)) continue;
      note_late(g, Phase::kRows, call.all.first_neighbour + local, call.near.epoch, done);
      failed.bit_or(0, static_cast<uint32_t>(Phase::kRows));
    }
  }
}

/// The last block to come here has the epoch and all counts advance: every block has read them. `why`: not 0
/// where no rows were moved.
DEEPEP_DEVICE void advance_epoch(const TwoLevelDispatchCall& call, uint32_t why) {
  using namespace dev;
  if (thread() != num_threads() - 1) return;
  const Group& g = call.near.g;
  if (!advance_epoch(g, &g.state->dispatch_epoch, call.near.epoch)) return;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  RailState* state = two_level.state;
  store(&state->dispatches, load(&state->dispatches) + 1);
  store(&state->claimed, 0u);
  close_wire(two_level.wire);
  if (why != 0) return;
  const auto sent = static_cast<uint64_t>(windows_of(two_level, call.args.dispatch.num_tokens));
  DEEPEP_ROLLED
  for (int o = 0; o < rails.num_out; ++o) {
    uint64_t* windows = &state->sent[rails.out[o]];
    store(windows, load(windows) + sent);
  }
  DEEPEP_ROLLED
  for (int i = 0; i < rails.num_in; ++i) {
    uint64_t* windows = &state->received[rails.in[i]];
    store(windows, load(windows) +
                       static_cast<uint64_t>(windows_of(two_level, tokens_of(call, rails.peer[rails.in[i]]))));
  }
}

}  // namespace deepep::kernels
