// Tokens to the ranks of their experts, once each: the phases of a dispatch that send.
#pragma once

#include "kernels/low_latency/cast.hpp"
#include "kernels/low_latency/dispatch_count.hpp"

namespace deepep::kernels {

/// A part of a token on its way: the unit of its row that a warp sends next, and lane k its k-th entry.
struct Outgoing {
  RowUnit row;
  int64_t entry;
};

[[nodiscard]] DEEPEP_DEVICE Outgoing load_outgoing(const LowLatencyDispatchArgs& args, int t, int unit) {
  using namespace dev;
  Outgoing next = {{}, -1};
  if (t >= tokens_of_block(args).end) return next;
  if (lane() < args.num_topk) next.entry = load_entry(args, t * args.num_topk + lane());
  if (unit < num_units(args.hidden)) next.row = load_unit(args, t, unit);
  return next;
}

/// What this warp sends first: asked for before anything else is done.
[[nodiscard]] DEEPEP_DEVICE Outgoing first_outgoing(const LowLatencyDispatchArgs& args) {
  const Team team = team_of_warp(args.share.token_shift);
  return load_outgoing(args, tokens_of_block(args).begin + team.number, team.part);
}

/// The rank of an expert, or -1.
[[nodiscard]] DEEPEP_DEVICE int owner_of(const LowLatencyDispatchArgs& args, int expert) {
  return expert >= 0 ? args.share.by_local_experts.quotient(expert) : -1;
}

/// Where a message of this rank's token t is written for a rank, in whose slots its place is `offset`.
[[nodiscard]] DEEPEP_DEVICE std::byte* message_to(const LowLatencyDispatchCall& call, int rank, int,
                                                  int64_t offset) {
  return at<std::byte>(call.g, rank, offset);
}

/// The channels of the block's tokens. Nothing is waited for: a message lies where its token's number says.
template <class Call>
DEEPEP_DEVICE void push_rows(const Call& call, Outgoing current) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  enter(call.lines, Step::kPushRows);
  const Team team = team_of_warp(args.share.token_shift);
  const int units = num_units(args.hidden);
  SharedArray<uint32_t> sent(call.shared().sent());
#pragma unroll 1
  for (int t = call.tokens.begin + team.number; t < call.tokens.end; t += team.teams) {
    const int owner = hop_to(call, owner_of(args, expert_of(args, current.entry)));
    const Destinations to{
        warp_or(owner >= 0 ? 1u << owner : 0u) & call.live,
        lane() < g.num_ranks
            ? reinterpret_cast<uint64_t>(message_to(
                  call, lane(), t, args.slots.messages(call.epoch, g.rank) + t * call.message.bytes()))
            : 0};
    if (team.part == 0 && lane() == 0) {
      sent.set(t - call.tokens.begin, to.ranks);
      store(args.handle.sent + t, to.ranks);
    }
    Outgoing next = {};
#pragma unroll 1
    for (int unit = team.part; unit < units; unit += team.parts) {
      const RowUnit row = current.row;
      if (unit + team.parts < units)
        current.row = load_unit(args, t, unit + team.parts);
      else
        next = load_outgoing(args, t + team.teams, team.part);
      if (args.casts)
        cast_unit(args, call.message, to, unit, row);
      else
        copy_unit(args, call.message, to, unit, row);
    }
    // A warp without a unit of this token has none of the next.
    current = team.part < units ? next : load_outgoing(args, t + team.teams, team.part);
  }
}

/// What a header says of a token, before rows are counted. Lane k: of its k-th entry.
struct HeaderDraft {
  int expert;     // or -1
  int owner;      // its rank, or -1
  bool is_again;  // an entry before it has the same expert
  uint32_t weight;
};

/// The token of the block that a warp writes headers of, the last warp first: it has the least to push.
[[nodiscard]] DEEPEP_DEVICE int header_token(const LowLatencyDispatchArgs& args) {
  return tokens_of_block(args).begin + dev::num_warps() - 1 - dev::warp();
}

[[nodiscard]] DEEPEP_DEVICE HeaderDraft draft_header(const LowLatencyDispatchArgs& args, int t) {
  using namespace dev;
  HeaderDraft draft = {-1, -1, false, 0};
  if (t >= tokens_of_block(args).end) return draft;
  if (lane() < args.num_topk) {
    draft.expert = expert_at(args, t * args.num_topk + lane());
    if (args.weights_travel) draft.weight = load_once(args.topk_weights + t * args.num_topk + lane());
  }
  draft.owner = owner_of(args, draft.expert);
#pragma unroll 1
  for (int k = 0; k < args.num_topk - 1; ++k) {
    const int earlier = shuffle(draft.expert, k);
    draft.is_again = draft.is_again || (k < lane() && earlier == draft.expert);
  }
  return draft;
}

/// Of the first token that this warp writes headers of.
[[nodiscard]] DEEPEP_DEVICE HeaderDraft first_header(const LowLatencyDispatchArgs& args) {
  return draft_header(args, header_token(args));
}

/// Lane k: the k-th entry of a token, for the header that its rank gets. One warp.
[[nodiscard]] DEEPEP_DEVICE uint32_t entry_of(const LowLatencyDispatchCall& call, const HeaderDraft& draft,
                                              int t) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  // The counts of block 0 are of all tokens, and none comes before its own.
  SharedArray<int32_t> rows(call.shared().rows());
  int row = draft.expert >= 0 && block() != 0 ? rows.get(draft.expert) : 0;
#pragma unroll 1
  for (int before = call.tokens.begin; before < t; ++before) {
    const int its_expert = lane() < args.num_topk ? expert_at(args, before * args.num_topk + lane()) : -1;
    bool has = false;
#pragma unroll 1
    for (int k = 0; k < args.num_topk; ++k) has = shuffle(its_expert, k) == draft.expert || has;
    row += has ? 1 : 0;
  }
  if (draft.expert < 0) return layout::kNoEntry;
  return layout::pack_entry(draft.expert - draft.owner * args.num_local_experts, row) |
         (draft.is_again ? layout::kRepeated : 0u);
}

/// Such an entry in the header that a rank gets; own: in that of its expert's rank.
[[nodiscard]] DEEPEP_DEVICE uint32_t entry_for(const LowLatencyDispatchCall&, const HeaderDraft& draft,
                                               uint32_t own, int rank) {
  return draft.owner == rank ? own : layout::kNoEntry;
}

/// The headers of the block's messages, a token a warp. `draft`: of the warp's first.
template <class Call>
DEEPEP_DEVICE void write_headers(const Call& call, HeaderDraft draft) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  enter(call.lines, Step::kPushRows);
  SharedArray<uint32_t> sent(call.shared().sent());
#pragma unroll 1
  for (int t = header_token(args); t < call.tokens.end; t += num_warps()) {
    const uint32_t own = entry_of(call, draft, t);
    const int64_t offset = args.slots.messages(call.epoch, g.rank) + t * call.message.bytes();
#pragma unroll 1
    for (uint32_t ranks = sent.get(t - call.tokens.begin); ranks != 0; ranks &= ranks - 1) {
      const int rank = lowest_bit(ranks);
      std::byte* there = message_to(call, rank, t, offset);
      if (lane() >= args.num_topk) continue;
      store(reinterpret_cast<uint32_t*>(there + call.message.entry(lane())),
            entry_for(call, draft, own, rank));
      store(reinterpret_cast<uint32_t*>(there + call.message.weight(lane())), draft.weight);
    }
    draft = draft_header(args, t + num_warps());
  }
}

/// The flags of the block's messages to others, a lane each: the block barrier orders all of the block's stores
/// before them. This rank's own messages need none: whoever writes one spreads it, or the next launch does.
template <class Call>
DEEPEP_DEVICE void signal_messages(const Call& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> sent(call.shared().sent());
  sync_block();
  if (!is_signaller()) return;
  enter(call.lines, Step::kSignal);
  const int shift = args.share.rank_shift;
#pragma unroll 1
  for (int i = lane(); i < (call.tokens.end - call.tokens.begin) << shift; i += kWarpSize) {
    const int peer = i & ((1 << shift) - 1);
    if (peer == g.rank || !is_mapped(call, peer) || ((sent.get(i >> shift) >> peer) & 1u) == 0) continue;
    uint32_t* flags = at<uint32_t>(g, peer, args.slots.message_flags(call.epoch, g.rank));
    store<release, sys_scope>(flags + call.tokens.begin + (i >> shift), call.epoch);
  }
}

}  // namespace deepep::kernels
