// Rows that stay in the domain: straight to their final places, as in one level; and the handle's rows.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// A chunk of this rank's tokens, as far as they go to ranks of its domain. Whole block.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE bool write_near(const TwoLevelDispatchCall& call, int64_t window, int chunk) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const Group& g = call.near.g;
  const ChunkTokens tokens = tokens_of_chunk(call.two_level, args.num_tokens, window, chunk);
  if (tokens.begin >= tokens.end) return true;
  const ChunkRoutes routes = routes_of<kCached>(call, tokens);
  const bool is_near = lane() < g.num_ranks && is_live(g, lane());
  const uint64_t slot_x =
      is_near ? reinterpret_cast<uint64_t>(recv_array<Vec16>(args, lane(), layout::kSlotRows)) : 0;
  const int pieces = static_cast<int>(args.row_bytes / 16);
#pragma unroll 1
  for (int i = warp(); i < tokens.size(); i += num_warps()) {
    const int64_t t = tokens.begin + i;
    const int32_t row = routes.row(i);
    const uint32_t destinations = ballot(is_near && row >= 0);
    if (destinations == 0) continue;
    HeldRow held{};
    if (args.num_scales > 0) held.scales = read_scales(args, t);
    store_row(reinterpret_cast<uint64_t>(args.x + t * args.row_bytes),
              slot_x + static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes), 0, pieces,
              destinations, held);
    for (uint32_t left = args.num_scales > 0 ? destinations : 0; left != 0; left &= left - 1) {
      const int d = lowest_bit(left);
      write_scales(args, held.scales, t, d, shuffle(row, d));
    }
  }
  // The few bytes behind the rows, of all tokens of the chunk together, by one warp.
  if (kCached || warp() != chunk % num_warps()) return true;
  const TokenGroup all{tokens.begin, tokens.size(), routes.going, routes.first_row};
  save_send_rows(args, all, lane() < g.num_ranks);
  write_fields(args, {all.begin, all.size, is_near ? all.going : 0u, all.first_row},
               read_entry(args, all.begin, all.size, lane()));
  return true;
}

}  // namespace deepep::kernels
