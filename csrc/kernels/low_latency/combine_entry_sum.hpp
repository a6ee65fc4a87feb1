// The sums of tokens, on the rank that owns them, where every top-k entry has a row that comes back: weighted
// here, k ascending, with one rounding. This rank's own rows are read where the caller has them.
#pragma once

#include "kernels/low_latency/combine_entries.hpp"
#include "kernels/low_latency/combine_sum.hpp"

namespace deepep::kernels {

/// Where the rows of this rank's token t have come. Lane k: the k-th entry's, if it has one, from the rank
/// `source`.
[[nodiscard]] DEEPEP_DEVICE uint64_t returned_entry(const LowLatencyCombineCall& call, int source, bool,
                                                    int t) {
  return entry_at(call, call.g.rank, source, t);
}

/// The rows of a token of this rank, with their weights; those of its own experts where they lie. One warp.
/// `ranks`: those whose rows are here.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE SumRows entries_of(const Call& call, int t, uint32_t ranks) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const int rank = call.g.rank;
  const int expert = lane() < args.num_topk ? expert_at(args, t * args.num_topk + lane()) : -1;
  const int source = expert < 0 ? 0 : args.share.by_local_experts.quotient(expert);
  const bool has_row = expert >= 0 && ((ranks >> source) & 1u) != 0;
  const float weight =
      has_row ? float_of_bits(load_once(args.topk_weights + t * args.num_topk + lane())) : 0.0f;
  uint64_t address = returned_entry(call, source, has_row, t);
  if ((ranks >> rank & 1u) != 0) {
    const Return own = find_return(call, {rank, t}, load_route(args, {rank, t}));
    if (source == rank) address = own.address;
  }
  return {ballot(has_row), address, weight};
}

/// The tokens of a block: all rows that come back, weighted, k ascending. One that does not come in time is a
/// fault.
template <class Call>
DEEPEP_DEVICE void sum_entries(const Call& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const int shift = args.share.token_shift;
  const Team team = team_of_warp(shift);
  const Pieces mine = pieces_of(call, team.part, shift);
  uint32_t ranks = call.ranks;
#pragma unroll 1
  for (int i = team.number; item_of_block(call.block, i, 0) < args.num_tokens; i += team.teams) {
    const int t = item_of_block(call.block, i, 0);
    ranks &= call.live;
    bool came = true;
    if (lane() != g.rank && ((ranks >> lane()) & 1u) != 0) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.return_flags(call.epoch, lane()));
      came = wait_return(call, flags + t, lane());
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kReturn));
      return;  // the deadline has passed
    }
    const SumRows rows = entries_of(call, t, ranks);
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * int64_t{2} * args.hidden);
    sum_rows<true>(out, rows, mine.begin, mine.end);
    ranks = ranks_of(args, item_of_block(call.block, i + team.teams, 0));
  }
}

/// All that a block receives; with masks, where a rank is missing, once more by the last block, without it.
template <class Call>
DEEPEP_DEVICE void receive_entries(Call& call) {
#pragma unroll 1
  do {
    if (wait_partners(call)) sum_entries(call);
  } while (mends(call));
}

}  // namespace deepep::kernels
