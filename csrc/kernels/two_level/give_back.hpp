// Rows go back to their token's gateway in this domain, over NVLink: to the token's place in its window.
#pragma once

#include "kernels/two_level/combine_call.hpp"

namespace deepep::kernels {

/// Where a token's row of rank `local` is staged at the gateway: both by local index.
[[nodiscard]] DEEPEP_DEVICE std::byte* staged_row(const TwoLevelCombineCall& call, int gateway, int slot,
                                                  int64_t half, int64_t token, int local) {
  const Group& g = call.near.g;
  return g.heap[gateway] + g.staging_offset + call.two_level.staging.row(slot, half, token, local);
}

/// One row, and its weights. One warp.
DEEPEP_DEVICE void give_back_row(const TwoLevelCombineCall& call, std::byte* staged, int64_t row) {
  using namespace dev;
  const CombineArgs& args = call.args.combine;
  const auto* from = reinterpret_cast<const Vec16*>(args.x + row * args.row_bytes);
  auto* to = reinterpret_cast<Vec16*>(staged);
  const int pieces = static_cast<int>(args.row_bytes / 16);
  for (int i = lane(); i < pieces; i += kWarpSize) store_streaming(to + i, load_once(from + i));
  for (int k = lane(); k < args.num_topk; k += kWarpSize)
    store(reinterpret_cast<float*>(staged + call.args.record.weight(k)),
          load_once(args.topk_weights + row * args.num_topk + k));
}

/// What this rank has of a chunk of tokens of `source`. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool give_back_rows(const TwoLevelCombineCall& call, const ItemTurn& turn,
                                                int source, int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Group& g = call.near.g;
  const int gateway = two_level.rails.gateway[source];
  if (gateway < 0 || gateway == g.rank || window >= windows_of(call, source)) return true;
  const layout::WindowTurn number{static_cast<int64_t>(return_number(call, source, window))};
  if (thread() == 0) {
    const uint32_t* summed =
        at<uint32_t>(g, g.rank, g.staging_offset + two_level.staging.summed(source, number.half()));
    const auto wanted = static_cast<uint32_t>(number.credit());
    if (!wait_reached<acquire, sys_scope>(summed, wanted, call.near.deadline)) {
      note_late(g, Phase::kStaging, call.all.first_neighbour + gateway, wanted, summed);
      turn.give_up();
    }
  }
  if (!turn.is_ready()) return false;
  const ChunkTokens tokens = tokens_of_chunk(two_level, tokens_of(call, source), window, chunk);
  const int64_t first = first_row_from(call, source, tokens.begin);
  const int64_t end = first_row_from(call, source, tokens.end);
  const int slot = two_level.rails.slot[source];
  for (int64_t row = first + warp(); row < end; row += num_warps()) {
    const int64_t token = load_once(call.args.source_token + row) - window * two_level.staging.window;
    give_back_row(call, staged_row(call, gateway, slot, number.half(), token, g.rank), row);
  }
  sync_block();
  if (thread() == 0)
    store<release, sys_scope>(
        at<uint32_t>(g, gateway,
                     g.staging_offset + two_level.staging.returned(slot, number.half(), chunk, g.rank)),
        static_cast<uint32_t>(number.arrivals()));
  return true;
}

}  // namespace deepep::kernels
