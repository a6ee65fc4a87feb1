// The sums of tokens, on the rank that owns them, of what its own domain's ranks return and one row from each
// other domain: every domain's sum is rounded, this rank's own as well.
#pragma once

#include "kernels/low_latency_rails/combine_relay.hpp"

namespace deepep::kernels {

/// The ranks of this domain, and of those before and behind it, as bits.
struct DomainOrder {
  uint32_t own;
  uint32_t before;
  uint32_t behind;

  [[nodiscard]] DEEPEP_DEVICE static DomainOrder of(const RailDomain& domain) {
    const uint32_t before = (1u << domain.first) - 1u, own = neighbours_of(domain);
    return {own, before, ~(before | own)};
  }
};

/// Adds pieces of the rows of some lanes.
DEEPEP_DEVICE void add_rows(LaneSums& total, const SumRows& given, uint32_t rows, int begin, int left) {
  using namespace dev;
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const Vec16* pieces = reinterpret_cast<const Vec16*>(shuffle(given.address, lowest_bit(rows))) + begin;
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u)
      if (u * kWarpSize < left)
        add_channels<false>(total.of[u], load_streaming(pieces + u * kWarpSize), 0.0f);
  }
}

/// The pieces from `begin` on of the sum of a token's rows, domains ascending: this one's are summed and
/// rounded before they are added.
[[nodiscard]] DEEPEP_DEVICE LaneSums sum_domains_of(const SumRows& given, const DomainOrder& order, int begin,
                                                    int left) {
  LaneSums total = begin_sums(given.rows);
  add_rows(total, given, given.rows & order.before, begin, left);
  const uint32_t near = given.rows & order.own;
  if (near != 0) {
    const LaneSums own = sum_pieces<false>({near, given.address, 0.0f}, begin, left);
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) add_channels<false>(total.of[u], round_channels(own.of[u]), 0.0f);
  }
  add_rows(total, given, given.rows & order.behind, begin, left);
  return total;
}

/// The tokens of a block, domains ascending. One that does not come in time is a fault. Nothing if ranks
/// disagree.
DEEPEP_DEVICE void sum_domains(const RailCombineCall& call, bool agreed) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  if (!agreed) return;
  const DomainOrder order = DomainOrder::of(call.domain);
  const int shift = args.share.token_shift;
  const Team team = team_of_warp(shift);
  const Pieces mine = pieces_of(call, team.part, shift);
  const int64_t row_bytes = int64_t{2} * args.hidden;
  uint32_t ranks = call.ranks;
#pragma unroll 1
  for (int i = team.number; item_of_block(call.block, i, 0) < args.num_tokens; i += team.teams) {
    const int t = item_of_block(call.block, i, 0);
    bool came = true;
    SumRows rows{ranks, 0, 0.0f};
    if ((ranks >> lane()) & 1u) {
      const auto* flags = at<uint32_t>(call.g, call.g.rank, args.slots.return_flags(call.epoch, lane()));
      came = wait_return(call, flags + t, lane());
      rows.address = reinterpret_cast<uint64_t>(
          returned_row(call, lane(), t, args.slots.returns(call.epoch, lane()) + t * row_bytes));
    }
    if (ballot(!came) != 0) {
      if (lane() == 0)
        SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kReturn));
      return;  // the deadline has passed
    }
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * row_bytes);
#pragma unroll 1
    for (int begin = mine.begin + lane(); begin < mine.end + lane(); begin += kSumUnroll * kWarpSize) {
      const int left = mine.end - begin;
      const LaneSums sum = sum_domains_of(rows, order, begin, left);
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u)
        if (u * kWarpSize < left) store_streaming(out + begin + u * kWarpSize, round_channels(sum.of[u]));
    }
    ranks = ranks_of(args, item_of_block(call.block, i + team.teams, 0));
  }
}

}  // namespace deepep::kernels
