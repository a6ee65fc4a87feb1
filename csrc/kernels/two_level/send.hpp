// Rows on their way to other domains: a chunk of tokens becomes the records of those that go there.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// One token into its record. One warp; `row`: of lane j, the token's final row at the other domain's rank with
/// the local index j, or -1.
DEEPEP_DEVICE void write_record(const TwoLevelDispatchCall& call, std::byte* record, int64_t t, int32_t row) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const layout::CrossingRecord<int64_t>& at = call.args.record;
  const auto* from = reinterpret_cast<const Vec16*>(args.x + t * args.row_bytes);
  auto* to = reinterpret_cast<Vec16*>(record);
  const int pieces = static_cast<int>(args.row_bytes / 16);
#pragma unroll 1
  for (int begin = lane(); begin < pieces; begin += kUnroll * kWarpSize) {
    Vec16 v[kUnroll];
    read_row(from + begin, pieces - begin, v);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (u * kWarpSize < pieces - begin) store_streaming(to + begin + u * kWarpSize, v[u]);
  }
  auto* words = reinterpret_cast<uint32_t*>(record);
  for (int i = lane(); i < args.num_scales; i += kWarpSize)
    store(words + at.scales() / 4 + i, scale_of(args, t, i));
  if (lane() == 0) store(words + at.token() / 4, static_cast<uint32_t>(t));
  if (lane() < call.two_level.staging.domain_ranks)
    store(words + at.final_row(lane()) / 4, static_cast<uint32_t>(row));
  for (int k = lane(); k < args.num_topk; k += kWarpSize) {
    const Entry entry = read_entry(args, t, 1, k);
    store(words + at.index(k) / 4, static_cast<uint32_t>(static_cast<int32_t>(entry.index)));
    store(words + at.weight(k) / 4, entry.weight);
  }
  pad_record(record, at.weight(args.num_topk), at.bytes());
}

/// A chunk of one of this rank's windows to one of the other domains. Whole block.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE bool send_chunk(const TwoLevelDispatchCall& call, const ItemTurn& turn, int o,
                                            int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  const int64_t tokens = call.args.dispatch.num_tokens;
  if (window >= windows_of(two_level, tokens)) return true;
  const int rail = rails.out[o];
  const uint64_t number = load(&two_level.state->sent[rail]) + static_cast<uint64_t>(window);
  if (thread() == 0) wait_window_credit(two_level, call.near.g, turn, rail, number, call.near.deadline);
  if (!turn.is_ready()) return false;
  const ChunkRoutes routes = routes_of<kCached>(call, tokens_of_chunk(two_level, tokens, window, chunk),
                                                rails.out_first[o], rails.out_size[o]);
  const uint32_t crossing = warp_or(routes.going);
  const int records = popcount(crossing);
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(number)}.half();
  auto* begin = remote_at<std::byte>(two_level, two_level.layout.windows.send_chunk(rail, half, chunk));
  const int64_t stride = call.args.record.bytes();
  if (thread() == 0) store(reinterpret_cast<Vec16*>(begin), Vec16{{static_cast<uint32_t>(records), 0, 0, 0}});
#pragma unroll 1
  for (int n = warp(); n < records; n += num_warps()) {
    const int i = nth_bit(crossing, n);
    write_record(call, begin + layout::kChunkHeader + n * stride, routes.tokens.begin + i, routes.row(i));
  }
  sync_block();
  if (thread() == 0) put_chunk(two_level, rail, number, chunk, records * stride);
  return true;
}

}  // namespace deepep::kernels
