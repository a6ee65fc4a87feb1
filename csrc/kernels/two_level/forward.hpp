// What comes from other domains: the gateway spreads each record over NVLink, to the final rows that it
// carries.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// One record to its rows. One warp.
DEEPEP_DEVICE void spread_record(const TwoLevelDispatchCall& call, const std::byte* record) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const layout::CrossingRecord<int64_t>& at = call.args.record;
  const Group& g = call.near.g;
  const auto* words = reinterpret_cast<const uint32_t*>(record);
  // Lane j handles the neighbour with this local index.
  const bool is_near = lane() < g.num_ranks && is_live(g, lane());
  const int32_t row = is_near ? static_cast<int32_t>(load(words + at.final_row(lane()) / 4)) : -1;
  const uint32_t destinations = ballot(row >= 0);
  const auto* from = reinterpret_cast<const Vec16*>(record);
  const uint64_t target =
      row >= 0 ? reinterpret_cast<uint64_t>(recv_array<std::byte>(args, lane(), layout::kSlotRows)) +
                     static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes)
               : 0;
  const int pieces = static_cast<int>(args.row_bytes / 16);
#pragma unroll 1
  for (int begin = lane(); begin < pieces + lane(); begin += kUnroll * kWarpSize) {
    Vec16 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (begin + u * kWarpSize < pieces) v[u] = load_streaming(from + begin + u * kWarpSize);
#pragma unroll 1
    for (uint32_t left = destinations; left != 0; left &= left - 1) {
      Vec16* to = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(left))) + begin;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (begin + u * kWarpSize < pieces) store_streaming(to + u * kWarpSize, v[u]);
    }
  }
  const int ranks = call.all.num_ranks;
  const layout::Placement placement(args.num_local_experts * ranks, ranks, ranks);
#pragma unroll 1
  for (uint32_t left = destinations; left != 0; left &= left - 1) {
    const int d = lowest_bit(left);
    const int64_t to = shuffle(row, d);
    for (int i = lane(); i < args.num_scales; i += kWarpSize)
      store(recv_array<uint32_t>(args, d, layout::kSlotScales) + to * args.num_scales + i,
            load(words + at.scales() / 4 + i));
    if (args.mode == DispatchMode::kCached) continue;
    if (lane() == 0)
      store(recv_array<int32_t>(args, d, layout::kSlotSource) + to,
            static_cast<int32_t>(load(words + at.token() / 4)));
    for (int k = lane(); k < args.num_topk; k += kWarpSize) {
      const auto expert = static_cast<int32_t>(load(words + at.index(k) / 4));
      const int32_t seen = placement.local_expert(expert, call.all.first_neighbour + d);
      const int64_t entry = to * args.num_topk + k;
      if (args.index_bytes == 8)
        store(recv_array<int64_t>(args, d, layout::kSlotIndices) + entry, int64_t{seen});
      else
        store(recv_array<int32_t>(args, d, layout::kSlotIndices) + entry, seen);
      store(recv_array<uint32_t>(args, d, layout::kSlotWeights) + entry,
            seen >= 0 ? load(words + at.weight(k) / 4) : 0u);
    }
  }
}

/// A chunk of a peer's window. The last of its window lets the peer go on. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool forward_chunk(const TwoLevelDispatchCall& call, const ItemTurn& turn, int i,
                                               int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const int rail = two_level.rails.in[i];
  if (window < 0 || window >= windows_of(two_level, tokens_of(call, two_level.rails.peer[rail]))) return true;
  const uint64_t number = load(&two_level.state->received[rail]) + static_cast<uint64_t>(window);
  if (thread() == 0)
    wait_chunk(two_level, call.near.g, turn, rail, number, chunk, Phase::kRows, call.near.deadline);
  if (!turn.is_ready()) return false;
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(number)}.half();
  const auto* begin =
      remote_at<const std::byte>(two_level, two_level.layout.windows.receive_chunk(rail, half, chunk));
  const auto records = static_cast<int>(load(reinterpret_cast<const uint32_t*>(begin)));
#pragma unroll 1
  for (int n = warp(); n < records; n += num_warps())
    spread_record(call, begin + layout::kChunkHeader + n * call.args.record.bytes());
  sync_block();
  if (thread() == 0 && count_chunk(two_level, &two_level.state->forwarded[rail][half]))
    grant_window_credit(two_level, rail, number);
  return true;
}

}  // namespace deepep::kernels
