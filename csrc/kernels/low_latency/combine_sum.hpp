// The sums of tokens, on the rank that owns them: what a combine does with the rows that come back.
#pragma once

#include "kernels/low_latency/combine_digest.hpp"
#include "kernels/low_latency/sum_rows.hpp"

namespace deepep::kernels {

/// The ranks that a token went to, as bits; 0 of a token past the last. The same on all lanes.
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of(const LowLatencyCombineArgs& args, int t) {
  if (args.refused || t >= args.num_tokens) return 0;
  return dev::load_once(args.handle.sent + t);
}

/// Of the first token that a block has for this warp's team: asked for before it is needed.
[[nodiscard]] DEEPEP_DEVICE uint32_t first_ranks(const LowLatencyCombineArgs& args, int block) {
  const Team team = team_of_warp(args.share.token_shift);
  return ranks_of(args, item_of_block(block, team.number, 0));
}

/// Has the call's block receive what `block` has.
DEEPEP_DEVICE void take_part(LowLatencyCombineCall& call, int block) {
  call.block = block;
  call.ranks = first_ranks(call.args, block);
}

/// Waits for the row of token t that `source` returns, by its flag.
[[nodiscard]] DEEPEP_DEVICE bool wait_return(const LowLatencyCombineCall& call, const uint32_t* flag,
                                             int source) {
  return wait_flag(call, flag, source, Phase::kReturn);
}
/// Where it lies: in this rank's slots at `offset`.
[[nodiscard]] DEEPEP_DEVICE std::byte* returned_row(const LowLatencyCombineCall& call, int, int,
                                                    int64_t offset) {
  return at<std::byte>(call.g, call.g.rank, offset);
}

/// The tokens of a block: the rows that come back, ranks ascending. One that does not come in time is a fault.
template <class Call>
DEEPEP_DEVICE void sum_tokens(const Call& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const int shift = args.share.token_shift;
  const Team team = team_of_warp(shift);
  const int pieces = args.hidden / 8;
  const int64_t row_bytes = int64_t{args.hidden} * 2;
  uint32_t ranks = call.ranks;
#pragma unroll 1
  for (int i = team.number; item_of_block(call.block, i, 0) < args.num_tokens; i += team.teams) {
    const int t = item_of_block(call.block, i, 0);
    ranks &= call.live;
    bool came = true;
    SumRows rows{ranks, 0, 0.0f};
    enter(call.lines, Step::kWaitRows);
    if ((ranks >> lane()) & 1u) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.return_flags(call.epoch, lane()));
      came = wait_return(call, flags + t, lane());
      rows.address = reinterpret_cast<uint64_t>(
          returned_row(call, lane(), t, args.slots.returns(call.epoch, lane()) + t * row_bytes));
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kReturn));
      return;  // the deadline has passed
    }
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    enter(call.lines, Step::kReduce);
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * row_bytes);
    sum_rows<false>(out, rows, (pieces * team.part) >> shift, (pieces * (team.part + 1)) >> shift);
    ranks = ranks_of(args, item_of_block(call.block, i + team.teams, 0));
  }
}

/// All that a block receives; with masks, where a rank is missing, once more by the last block, without it.
template <class Call>
DEEPEP_DEVICE void receive_returns(Call& call) {
#pragma unroll 1
  do {
    if (wait_partners(call)) sum_tokens(call);
  } while (mends(call));
}

}  // namespace deepep::kernels
