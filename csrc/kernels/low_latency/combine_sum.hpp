// The sums of tokens, on the rank that owns them: what a combine does with the rows that come back.
#pragma once

#include "kernels/low_latency/combine_digest.hpp"
#include "kernels/low_latency/sum_rows.hpp"

namespace deepep::kernels {

/// The ranks that a token went to and that take part, as bits; 0 of a token past the last. The same on all
/// lanes.
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of(const LowLatencyCombineArgs& args, int t) {
  if (args.refused || t >= args.num_tokens) return 0;
  return dev::load_once(args.handle.sent + t) & args.group.live;
}

/// Of the first token of this warp's team: asked for before it is needed.
[[nodiscard]] DEEPEP_DEVICE uint32_t first_ranks(const LowLatencyCombineArgs& args) {
  const Team team = team_of_warp(args.share.token_shift);
  return ranks_of(args, item_of_block(team.number, 0));
}

/// The block's tokens: the rows that come back, ranks ascending. One that does not come in time is a fault.
/// `ranks`: of the first.
DEEPEP_DEVICE void sum_tokens(const LowLatencyCombineCall& call, uint32_t ranks) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const int shift = args.share.token_shift;
  const Team team = team_of_warp(shift);
  const int pieces = args.hidden / 8;
  const int64_t row_bytes = int64_t{args.hidden} * 2;
#pragma unroll 1
  for (int i = team.number; item_of_block(i, 0) < args.num_tokens; i += team.teams) {
    const int t = item_of_block(i, 0);
    bool came = true;
    SumRows rows{ranks, 0, 0.0f};
    if ((ranks >> lane()) & 1u) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.return_flags(call.epoch, lane()));
      came = wait_flag(call, flags + t, lane(), Phase::kReturn);
      rows.address = reinterpret_cast<uint64_t>(
          at<std::byte>(g, g.rank, args.slots.returns(call.epoch, lane()) + t * row_bytes));
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kReturn));
      return;  // the deadline has passed
    }
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * row_bytes);
    sum_rows<false>(out, rows, (pieces * team.part) >> shift, (pieces * (team.part + 1)) >> shift);
    ranks = ranks_of(args, item_of_block(i + team.teams, 0));
  }
}

}  // namespace deepep::kernels
