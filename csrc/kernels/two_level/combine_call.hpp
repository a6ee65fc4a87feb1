// A two-level combine as its blocks see it, and what ranks have to learn of each other before.
#pragma once

#include "kernels/combine/digest.hpp"
#include "kernels/combine/sum_row.hpp"
#include "kernels/two_level/items.hpp"

namespace deepep::kernels {

struct TwoLevelCombineCall {
  const TwoLevelCombineArgs& args;
  const TwoLevelArgs& two_level;
  CombineCall all;   // of all ranks that take part
  CombineCall near;  // of those of this domain
};

/// The block's words behind those of one level.
struct TwoLevelCombineShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t tokens() const {  // uint32 [R]: T of every rank
    return layout::align_up(CombineShared{num_ranks}.bytes(), 16);
  }
  /// uint32: whether no rank may be waited for any more.
  [[nodiscard]] DEEPEP_HD int64_t disagrees() const { return tokens() + 4 * static_cast<int64_t>(num_ranks); }
  [[nodiscard]] DEEPEP_HD int64_t items() const { return layout::align_up(disagrees() + 4, 16); }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return ItemShared{items()}.end(); }
};

/// A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE TwoLevelCombineCall start(const TwoLevelCombineArgs& args) {
  using namespace dev;
  const CombineCall all = start(args.combine);
  SharedArray<uint32_t> disagrees(TwoLevelCombineShared{all.g.num_ranks}.disagrees());
  if (thread() == 0) disagrees.set(0, 0u);
  return {args, args.two_level, all, {args.combine, args.two_level.near, all.epoch, all.deadline}};
}

[[nodiscard]] DEEPEP_DEVICE bool is_first_block() { return dev::block() == 0; }

/// What a rank posts: one warp to the neighbours, lane r to rank r.
DEEPEP_DEVICE void post_near(const CombineCall& near, int source, uint32_t digest, uint32_t tokens) {
  using namespace dev;
  const Group& g = near.g;
  if (lane() >= g.num_ranks || !is_live(g, lane())) return;
  store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_digest(source, near.epoch)),
                            pack_tagged(digest, near.epoch));
  store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_tokens(source, near.epoch)),
                            pack_tagged(tokens, near.epoch));
}

/// A refusal where this rank takes no part, which no rank agrees with. Whole warps.
[[nodiscard]] DEEPEP_DEVICE uint32_t digest_of(const TwoLevelCombineCall& call) {
  return call.args.combine.mode == CombineMode::kRefused ? kRefusal : digest_of(call.all);
}

/// Block 0, one warp: this rank's digest and T to its neighbours, and to its gateways by puts, a lane each. Why
/// what a put is made from may be written two calls later: as in metadata.hpp.
DEEPEP_DEVICE void post_digest(const TwoLevelCombineCall& call) {
  using namespace dev;
  if (!is_first_block() || warp() != 0) return;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  const uint32_t digest = digest_of(call);
  const auto tokens = static_cast<uint32_t>(call.args.combine.num_tokens);
  post_near(call.near, call.all.g.rank, digest, tokens);
  const int64_t parity = layout::WindowTurn{static_cast<int64_t>(load(&two_level.state->combines))}.half();
  for (int o = lane(); o < rails.num_out; o += kWarpSize) {
    const int rail = rails.out[o];
    const int there = rails.there[rail];
    auto* out = remote_at<uint32_t>(two_level, two_level.layout.digest_out(rail, parity));
    store(out, digest);
    store(out + 1, tokens);
    put_signal<signal_add>(two_level.wire,
                           remote_at<uint32_t>(two_level, two_level.layout.digest(there, parity)), out, 8,
                           remote_at<uint64_t>(two_level, two_level.layout.digest_signal(there, parity)), 1,
                           rails.peer[rail]);
  }
}

/// Block 0: what ranks of other domains have posted to this rank, their gateway, to its neighbours. A warp a
/// source.
[[nodiscard]] DEEPEP_DEVICE bool relay_digests(const TwoLevelCombineCall& call) {
  using namespace dev;
  if (!is_first_block()) return true;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  const layout::WindowTurn turn{static_cast<int64_t>(load(&two_level.state->combines))};
  bool came = true;
  for (int i = warp(); i < rails.num_in; i += num_warps()) {
    const int rail = rails.in[i];
    const uint64_t* raised = remote_at<uint64_t>(two_level, two_level.layout.digest_signal(rail, turn.half()));
    if (lane() == 0) {
      const auto wanted = static_cast<uint32_t>(turn.arrivals());
      came = wait_signal<acquire, sys_scope>(raised, wanted, call.all.deadline);
      if (!came) note_late(call.all.g, Phase::kReturn, 1u << rails.peer[rail], wanted, raised);
    }
    sync_warp();  // lane 0's acquire comes before what the warp reads
    came = ballot(!came) == 0;
    if (!came) break;
    // What the source knew when it posted goes along to those who read these words.
    fence<acq_rel, sys_scope>();
    const auto* posted = remote_at<uint32_t>(two_level, two_level.layout.digest(rail, turn.half()));
    post_near(call.near, rails.peer[rail], load(posted), load(posted + 1));
  }
  return came;
}

/// The digests of all live ranks, and their T, into shared memory. Whole block; whether all agree.
[[nodiscard]] DEEPEP_DEVICE bool wait_digests(const TwoLevelCombineCall& call) {
  using namespace dev;
  const Group& g = call.all.g;
  const TwoLevelCombineShared shared{g.num_ranks};
  SharedArray<uint32_t> tokens(shared.tokens());
  SharedArray<uint32_t> disagrees(shared.disagrees());
  if (warp() == 0) {
    bool agrees = wait_digests(call.all, digest_of(call));
    uint32_t seen = 0;
    if (agrees && lane() < g.num_ranks && is_live(g, lane())) {
      const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_tokens(lane(), call.all.epoch));
      agrees = wait_tag<acquire, sys_scope>(word, call.all.epoch, call.all.deadline, seen);
      if (!agrees) note_fault(g, Phase::kReturn, 1u << lane(), call.all.epoch, 0);
    }
    if (lane() < g.num_ranks) tokens.set(lane(), seen);
    if (!agrees) disagrees.bit_or(0, 1u);
  }
  sync_block();
  return disagrees.get(0) == 0;
}

[[nodiscard]] DEEPEP_DEVICE int64_t tokens_of(const TwoLevelCombineCall& call, int source) {
  const TwoLevelCombineShared shared{call.all.g.num_ranks};
  return dev::SharedArray<uint32_t>(shared.tokens()).get(source);
}

[[nodiscard]] DEEPEP_DEVICE int64_t windows_of(const TwoLevelCombineCall& call, int source) {
  return windows_of(call.two_level, tokens_of(call, source));
}

/// The number of a window of `source` among all that combines have returned.
[[nodiscard]] DEEPEP_DEVICE uint64_t return_number(const TwoLevelCombineCall& call, int source,
                                                   int64_t window) {
  return dev::load(&call.two_level.state->returned[source]) + static_cast<uint64_t>(window);
}

/// Whether rank r has a row of token t. A dispatch that was given up has left counts of 0, and maybe nothing
/// else.
[[nodiscard]] DEEPEP_DEVICE bool has_row(const TwoLevelCombineCall& call, int64_t t, int r) {
  const Group& g = call.all.g;
  if (!is_live(g, r) || call.all.counts()(g.rank, r) == 0) return false;
  return dev::load_once(call.args.combine.send_row + t * g.num_ranks + r) >= 0;
}

/// Which of the chunk's tokens have a row at this lane's rank: bit i of token i.
[[nodiscard]] DEEPEP_DEVICE uint32_t returning_tokens(const TwoLevelCombineCall& call,
                                                      const ChunkTokens& tokens) {
  using namespace dev;
  uint32_t returning = 0;
  if (lane() >= call.all.g.num_ranks) return 0;
#pragma unroll 1
  for (int i = 0; i < tokens.size(); ++i)
    returning |= static_cast<uint32_t>(has_row(call, tokens.begin + i, lane())) << i;
  return returning;
}

/// The first of the rows that this rank has received from `source` whose token is `token` or a later one.
[[nodiscard]] DEEPEP_DEVICE int64_t first_row_from(const TwoLevelCombineCall& call, int source, int64_t token) {
  const auto count = call.all.counts();
  int64_t low = layout::first_row_of_source(count, source, call.all.g.rank);
  int64_t high = low + count(source, call.all.g.rank);
#pragma unroll 1
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (dev::load_once(call.args.source_token + middle) < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace deepep::kernels
