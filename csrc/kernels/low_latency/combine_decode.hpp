// The sums of tokens, on the rank that owns them, of rows that come back in LogFMT: this rank's own as well.
#pragma once

#include "kernels/low_latency/combine_encode.hpp"
#include "kernels/low_latency/combine_sum.hpp"

namespace deepep::kernels {

/// The rows of a token: one of each rank. Lane r: rank r's.
[[nodiscard]] DEEPEP_DEVICE LogfmtRows sums_of(const LowLatencyCombineCall& call, int t, uint32_t ranks) {
  const bool has_row = ((ranks >> dev::lane()) & 1u) != 0;
  const LogfmtPlace at = place_of(call, call.g.rank, has_row ? dev::lane() : 0, t);
  return {{ranks, reinterpret_cast<uint64_t>(at.row), 0.0f}, reinterpret_cast<uint64_t>(at.metadata)};
}

/// The same of each of its entries. Lane k: the k-th's.
[[nodiscard]] DEEPEP_DEVICE LogfmtRows encoded_entries_of(const LowLatencyCombineCall& call, int t,
                                                          uint32_t ranks) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const int i = t * args.num_topk + lane();
  const int expert = lane() < args.num_topk ? expert_at(args, i) : -1;
  const int source = expert < 0 ? 0 : args.share.by_local_experts.quotient(expert);
  const bool has_row = expert >= 0 && ((ranks >> source) & 1u) != 0;
  const LogfmtPlace at = place_of(call, call.g.rank, source, i);
  return {{ballot(has_row), reinterpret_cast<uint64_t>(at.row),
           has_row ? float_of_bits(load_once(args.topk_weights + i)) : 0.0f},
          reinterpret_cast<uint64_t>(at.metadata)};
}

/// Waits for all rows of a token. One warp. False if one does not come in time, which is a fault.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_token(const Call& call, int t, uint32_t ranks) {
  using namespace dev;
  bool came = true;
  if (((ranks >> lane()) & 1u) != 0) {
    const int64_t flags_at = call.args.slots.return_flags(call.epoch, lane());
    const uint32_t* flags = at<uint32_t>(call.g, call.g.rank, flags_at);
    came = wait_return(call, flags + t, lane());
  }
  if (ballot(!came) == 0) return true;
  if (lane() == 0)
    SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kReturn));
  return false;
}

/// The tokens of a block: the rows that come back, ranks or, with their weights, entries ascending.
template <bool kEntries, class Call>
DEEPEP_DEVICE void decode_tokens(const Call& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const int shift = args.share.token_shift;
  const Team team = team_of_warp(shift);
  const LogfmtRow shape = LogfmtRow::of(args.hidden);
  const Pieces units = share_of_team(shape.units(), team, shift);
  uint32_t ranks = call.ranks;
#pragma unroll 1
  for (int i = team.number; item_of_block(call.block, i, 0) < args.num_tokens; i += team.teams) {
    const int t = item_of_block(call.block, i, 0);
    ranks &= call.live;
    if (!wait_token(call, t, ranks)) return;  // the deadline has passed
    const auto rows = kEntries ? encoded_entries_of(call, t, ranks) : sums_of(call, t, ranks);
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * int64_t{2} * args.hidden);
    sum_logfmt_rows<kEntries>(out, rows, shape, units.begin, units.end);
    ranks = ranks_of(args, item_of_block(call.block, i + team.teams, 0));
  }
}

/// All that a block receives; with masks, where a rank is missing, once more by the last block, without it.
template <class Call>
DEEPEP_DEVICE void decode_returns(Call& call) {
#pragma unroll 1
  do {
    if (wait_partners(call)) decode_tokens<false>(call);
  } while (mends(call));
}

/// The same where every top-k entry has a row.
template <class Call>
DEEPEP_DEVICE void decode_entries(Call& call) {
#pragma unroll 1
  do {
    if (wait_partners(call)) decode_tokens<true>(call);
  } while (mends(call));
}

}  // namespace deepep::kernels
