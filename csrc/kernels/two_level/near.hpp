// Rows that stay in the domain: straight to their final places, as in one level; and the handle's rows, of all
// ranks.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// The rows of a chunk's tokens at all ranks into the handle, -1 for none: a warp those of 32 ranks.
DEEPEP_DEVICE void save_send_rows(const TwoLevelDispatchCall& call, const ChunkTokens& tokens) {
  using namespace dev;
  const int ranks = call.all.num_ranks;
  int32_t* to = call.args.dispatch.send_row + tokens.begin * ranks;
#pragma unroll 1
  for (int first = warp() * kWarpSize; first < ranks; first += num_warps() * kWarpSize) {
    const int size = layout::min_of(ranks - first, kWarpSize);
    const ChunkRoutes routes = routes_of<false>(call, tokens, first, size);
#pragma unroll 1
    for (int i = 0; i < tokens.size(); ++i)
      if (lane() < size) store(to + i * ranks + first + lane(), routes.row(i));
  }
}

/// A chunk of this rank's tokens, as far as they go to ranks of its domain. Whole block.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE bool write_near(const TwoLevelDispatchCall& call, int64_t window, int chunk) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const Group& g = call.near.g;
  const ChunkTokens tokens = tokens_of_chunk(call.two_level, args.num_tokens, window, chunk);
  if (tokens.begin >= tokens.end) return true;
  const int first = call.all.first_neighbour;
  const ChunkRoutes routes = routes_of<kCached>(call, tokens, first, g.num_ranks);
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
  if (kCached) return true;
  save_send_rows(call, tokens);
  // The few bytes behind the rows, of all tokens of the chunk together, by one warp.
  if (warp() != chunk % num_warps()) return true;
  write_fields(args, {tokens.begin, tokens.size(), is_near ? routes.going : 0u, routes.first_row},
               read_entry(args, tokens.begin, tokens.size(), lane()), first, call.all.num_ranks);
  return true;
}

}  // namespace deepep::kernels
