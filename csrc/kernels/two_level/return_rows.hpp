// The rows and sums of a two-level combine, in items that blocks claim, and its end.
#pragma once

#include "kernels/two_level/ask.hpp"
#include "kernels/two_level/owner_sum.hpp"

namespace deepep::kernels {

/// The items of a call: stage by stage, in each what is asked for window k; the rows that go back for window k
/// of every source; the sums of window k - 1 for other domains, and those of this rank's own tokens. What
/// window k waits for is of windows up to k - 2, but for the sums of window k - 1, which wait for rows and for
/// what was asked of that window: all in stages before.
struct CombineItems {
  int chunks;
  int num_out;
  int num_in;
  int num_ranks;

  [[nodiscard]] DEEPEP_DEVICE uint32_t a_stage() const {
    return static_cast<uint32_t>(num_out + (num_ranks + num_in + 1) * chunks);
  }
};

[[nodiscard]] DEEPEP_DEVICE int64_t num_stages(const TwoLevelCombineCall& call) {
  int64_t most = 0;
  DEEPEP_ROLLED
  for (int source = 0; source < call.all.num_ranks; ++source)
    most = layout::max_of(most, windows_of(call, source));
  return most + 1;
}

/// Whole block. False if something was waited for in vain, which is noted.
[[nodiscard]] DEEPEP_DEVICE bool return_rows(const TwoLevelCombineCall& call) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const CombineItems items{num_chunks(two_level), two_level.rails.num_out, two_level.rails.num_in,
                           call.all.num_ranks};
  const uint32_t a_stage = items.a_stage();
  const auto num_items = static_cast<uint32_t>(num_stages(call)) * a_stage;
  return work_on_items(two_level, shared_of(call.args).items(), num_items,
                       [&](uint32_t item, const ItemTurn& turn) {
                         const int64_t stage = item / a_stage;
                         const int place = static_cast<int>(item % a_stage);
                         if (place < items.num_out) return ask_for_sums(call, turn, place, stage);
                         const int what = (place - items.num_out) / items.chunks;
                         const int chunk = (place - items.num_out) % items.chunks;
                         if (what < items.num_ranks) return give_back_rows(call, turn, what, stage, chunk);
                         if (what < items.num_ranks + items.num_in)
                           return send_sums(call, turn, what - items.num_ranks, stage - 1, chunk);
                         return sum_chunk(call, turn, stage - 1, chunk);
                       });
}

/// The last block to come here has the epoch and all counts advance: every block has read them. `agrees`:
/// whether rows were returned.
DEEPEP_DEVICE void advance_epoch(const TwoLevelCombineCall& call, bool agrees) {
  using namespace dev;
  if (thread() != num_threads() - 1) return;
  const Group& g = call.near.g;
  if (!advance_epoch(g, &g.state->combine_epoch, call.near.epoch)) return;
  const Rails& rails = call.two_level.rails;
  RailState* state = call.two_level.state;
  store(&state->combines, load(&state->combines) + 1);
  store(&state->claimed, 0u);
  close_wire(call.two_level.wire);
  if (!agrees) return;
  DEEPEP_ROLLED
  for (int source = 0; source < call.all.num_ranks; ++source)
    store(&state->returned[source],
          load(&state->returned[source]) + static_cast<uint64_t>(windows_of(call, source)));
  DEEPEP_ROLLED
  for (int o = 0; o < rails.num_out; ++o) {
    uint64_t* windows = &state->received[rails.out[o]];
    store(windows, load(windows) + static_cast<uint64_t>(windows_of(call, call.all.rank)));
  }
  DEEPEP_ROLLED
  for (int i = 0; i < rails.num_in; ++i) {
    uint64_t* windows = &state->sent[rails.in[i]];
    store(windows, load(windows) + static_cast<uint64_t>(windows_of(call, rails.peer[rails.in[i]])));
  }
}

/// True on one thread of a block in which something was waited for in vain. `succeeded`: of each thread.
[[nodiscard]] DEEPEP_DEVICE bool finish(const TwoLevelCombineCall& call, bool succeeded) {
  using namespace dev;
  SharedArray<uint32_t> failed(shared_of(call.args).failed());
  if (!succeeded) failed.bit_or(0, 1u);
  sync_block();
  return thread() == 0 && failed.get(0) != 0;
}

}  // namespace deepep::kernels
