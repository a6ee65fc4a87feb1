// A token's owner asks its gateways for the sums of a window: which of their domain's ranks have a row of each
// token. So handles are those of one level, and a rank may be masked in between.
#pragma once

#include "kernels/two_level/combine_call.hpp"

namespace deepep::kernels {

/// Waits until the sums of the window two before are here: the gateway has read what it was asked for then.
/// Threads each some of its chunks.
DEEPEP_DEVICE void wait_former_sums(const TwoLevelCombineCall& call, const ItemTurn& turn, int rail,
                                    int64_t window) {
  using namespace dev;
  if (window < 2) return;  // those of an earlier call were all here when it ended
  const uint64_t number = load(&call.two_level.state->received[rail]) + static_cast<uint64_t>(window - 2);
  for (int chunk = thread(); chunk < num_chunks(call.two_level); chunk += num_threads())
    wait_chunk(call.two_level, call.near.g, turn, rail, number, chunk, Phase::kReturn, call.near.deadline);
}

/// The window of one of the other domains. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool ask_for_sums(const TwoLevelCombineCall& call, const ItemTurn& turn, int o,
                                              int64_t window) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  if (window >= windows_of(call, call.all.rank)) return true;
  const int rail = rails.out[o];
  wait_former_sums(call, turn, rail, window);
  if (!turn.is_ready()) return false;
  const layout::WindowTurn number{static_cast<int64_t>(return_number(call, call.all.rank, window))};
  auto* out = remote_at<uint32_t>(two_level, two_level.layout.ask_out(rail, number.half()));
  const int64_t first = window * two_level.staging.window;
  for (int64_t i = thread(); i < two_level.staging.window; i += num_threads()) {
    uint32_t ranks = 0;
    for (int local = 0; local < rails.out_size[o]; ++local) {
      const bool returns =
          first + i < call.args.combine.num_tokens && has_row(call, first + i, rails.out_first[o] + local);
      ranks |= static_cast<uint32_t>(returns) << local;
    }
    store(out + i, ranks);
  }
  sync_block();
  if (thread() != 0) return true;
  const int there = rails.there[rail];
  fence<acq_rel, sys_scope>();
  put_signal<signal_add>(two_level.wire,
                         remote_at<uint32_t>(two_level, two_level.layout.ask(there, number.half())), out,
                         4 * two_level.staging.window,
                         remote_at<uint64_t>(two_level, two_level.layout.ask_signal(there, number.half())), 1,
                         rails.peer[rail]);
  return true;
}

}  // namespace deepep::kernels
