// The last sum, at a token's owner: biases, then the domains' sums, domains ascending, in fp32, rounded once.
#pragma once

#include "kernels/two_level/domain_sum.hpp"

namespace deepep::kernels {

/// One token of a chunk. `records`: of lane o, where the sums of other domain number o lie; `crossing`: which
/// of the chunk's tokens have one, as bits. One warp.
DEEPEP_DEVICE void sum_token(const TwoLevelCombineCall& call, const DomainRows& own, int64_t t, int i,
                             uint64_t records, uint32_t crossing) {
  using namespace dev;
  const CombineArgs& args = call.args.combine;
  const Rails& rails = call.two_level.rails;
  const int pieces = static_cast<int>(args.row_bytes / 16);
  auto* out = reinterpret_cast<Vec16*>(args.out + t * args.row_bytes);
  // A domain with one row adds no rounding, and its sum is that row; else it is made where the result will be.
  const Addends here = list_rows(call, own);
  uint64_t own_sum = shuffle(here.address, 0);
  if (here.count > 1) {
    reduce_many(out, here, 0, pieces);
    own_sum = reinterpret_cast<uint64_t>(out);
  }
  const float own_weight = sum_weights(call, own);
  const uint64_t record = records + static_cast<uint64_t>(bits_before(crossing, i)) *
                                        static_cast<uint64_t>(call.args.record.bytes());
  Addends addends{0, 0, 0};
  float weight = 0.0f;
  const auto append = [&](uint64_t address) {
    if (lane() == addends.count) addends.address = address;
    ++addends.count;
  };
  for (int b = 0; b < 2; ++b)
    if (args.bias[b] != nullptr) append(reinterpret_cast<uint64_t>(args.bias[b] + t * args.row_bytes));
  bool has_own = here.count > 0;
  for (int o = 0; o <= rails.num_out; ++o) {
    if (has_own && (o == rails.num_out || rails.out_first[o] > call.all.first_neighbour)) {
      append(own_sum);
      weight = add_rounded(weight, own_weight);
      has_own = false;
    }
    if (o == rails.num_out || ((shuffle(crossing, o) >> i) & 1u) == 0) continue;
    const uint64_t from = shuffle(record, o);
    append(from);
    if (lane() < args.num_topk)
      weight = add_rounded(
          weight,
          load(reinterpret_cast<const float*>(from + static_cast<uint64_t>(call.args.record.weight(lane())))));
  }
  reduce_many(out, addends, 0, pieces);
  if (lane() < args.num_topk) store(args.out_weights + t * args.num_topk + lane(), weight);
}

/// What is known of a chunk's sums before they are added up.
struct ChunkSums {
  uint32_t here;      // of lane j: which of its tokens have a row at the neighbour with this local index
  uint32_t crossing;  // of lane o: which have a sum of other domain number o
  uint64_t records;   // of lane o: where those sums lie
};

/// One warp.
[[nodiscard]] DEEPEP_DEVICE ChunkSums sums_of_chunk(const TwoLevelCombineCall& call, const ChunkTokens& tokens,
                                                    int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  ChunkSums sums{0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < call.all.num_ranks; first += kWarpSize) {
    const uint32_t returning = returning_tokens(call, tokens, first);
    const int near = call.all.first_neighbour + lane() - first;
    const bool holds = near >= 0 && near < kWarpSize && lane() < call.near.g.num_ranks;
    const uint32_t there = shuffle(returning, holds ? near : 0);
    if (holds) sums.here = there;
#pragma unroll 1
    for (int o = 0; o < rails.num_out; ++o) {
      const int local = first + lane() - rails.out_first[o];
      const uint32_t in_domain = warp_or(local >= 0 && local < rails.out_size[o] ? returning : 0u);
      if (lane() == o) sums.crossing |= in_domain;
    }
  }
  if (lane() >= rails.num_out) return sums;
  const int rail = rails.out[lane()];
  const uint64_t received = load(&two_level.state->received[rail]) + static_cast<uint64_t>(window);
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(received)}.half();
  sums.records = reinterpret_cast<uint64_t>(remote_at<std::byte>(
                     two_level, two_level.layout.windows.receive_chunk(rail, half, chunk))) +
                 layout::kChunkHeader;
  return sums;
}

/// A chunk of one of this rank's windows. The last of its window lets all others go on. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool sum_chunk(const TwoLevelCombineCall& call, const ItemTurn& turn,
                                           int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  const Group& g = call.near.g;
  const int rank = call.all.rank;
  if (window < 0 || window >= windows_of(call, rank)) return true;
  const layout::WindowTurn number{static_cast<int64_t>(return_number(call, rank, window))};
  wait_returned(call, turn, 0, number, chunk);
  for (int o = thread(); o < rails.num_out; o += num_threads())
    wait_chunk(two_level, g, turn, rails.out[o],
               load(&two_level.state->received[rails.out[o]]) + static_cast<uint64_t>(window), chunk,
               Phase::kReturn, call.near.deadline);
  if (!turn.is_ready()) return false;
  const ChunkTokens tokens = tokens_of_chunk(two_level, call.args.combine.num_tokens, window, chunk);
  const ChunkSums sums = sums_of_chunk(call, tokens, window, chunk);
#pragma unroll 1
  for (int i = warp(); i < tokens.size(); i += num_warps()) {
    const int64_t t = tokens.begin + i;
    const uint32_t ranks = ballot((sums.here >> i) & 1u);
    const DomainRows own{.slot = 0,
                         .half = number.half(),
                         .token = chunk * int64_t{layout::kChunkRecords} + i,
                         .own = ((ranks >> g.rank) & 1u) != 0
                                    ? load_once(call.args.combine.send_row + t * call.all.num_ranks + rank)
                                    : 0,
                         .ranks = ranks};
    sum_token(call, own, t, i, sums.records, sums.crossing);
  }
  sync_block();
  const bool is_alone = rails.num_out == 0 && g.live == 1u << g.rank;  // nobody waits, for nobody
  if (thread() != 0 || is_alone || !count_chunk(two_level, &two_level.state->summed[0][number.half()]))
    return true;
  grant_staging(call, rank, number);
  for (int o = 0; o < rails.num_out; ++o)
    grant_window_credit(two_level, rails.out[o],
                        load(&two_level.state->received[rails.out[o]]) + static_cast<uint64_t>(window));
  return true;
}

}  // namespace deepep::kernels
