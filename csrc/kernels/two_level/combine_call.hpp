// A two-level combine as its blocks see it, and what ranks have to learn of each other before.
#pragma once

#include "kernels/combine/call.hpp"
#include "kernels/combine/sum_row.hpp"
#include "kernels/two_level/items.hpp"

namespace deepep::kernels {

struct TwoLevelCombineCall {
  const TwoLevelCombineArgs& args;
  const TwoLevelArgs& two_level;
  const AllRanks& all;
  CombineCall near;  // of this domain's ranks, by local index
};

/// The block's dynamic shared memory: of the handle's counts, what concerns this rank.
struct TwoLevelCombineShared {
  int num_ranks;

  /// Rows from this rank to each: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t sends() const { return 0; }
  /// Rows from each to this rank: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t receives() const { return sends() + per_rank(); }
  /// The first of them here: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t first_rows() const { return receives() + per_rank(); }
  [[nodiscard]] DEEPEP_HD int64_t tokens() const { return first_rows() + per_rank(); }  // uint32 [R]: T of each
  /// uint32: a digest of all counts
  [[nodiscard]] DEEPEP_HD int64_t digest() const { return tokens() + per_rank(); }
  /// uint32: whether no rank may be waited for any more.
  [[nodiscard]] DEEPEP_HD int64_t disagrees() const { return digest() + 4; }
  /// uint32: whether some thread has waited in vain
  [[nodiscard]] DEEPEP_HD int64_t failed() const { return digest() + 8; }
  [[nodiscard]] DEEPEP_HD int64_t items() const { return layout::align_up(digest() + 12, 16); }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return ItemShared{items()}.end(); }

 private:
  [[nodiscard]] DEEPEP_HD int64_t per_rank() const { return 4 * static_cast<int64_t>(num_ranks); }
};

[[nodiscard]] DEEPEP_HD TwoLevelCombineShared shared_of(const TwoLevelCombineArgs& args) {
  return {args.two_level.all.num_ranks};
}

/// Reads the epoch. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE TwoLevelCombineCall start(const TwoLevelCombineArgs& args) {
  using namespace dev;
  const Group& near = args.combine.group;
  const TwoLevelCombineShared shared = shared_of(args);
  const Deadline deadline = Deadline::in(near.timeout_ns);
  const uint32_t epoch = next_epoch(&near.state->combine_epoch);
  if (thread() == 0) {
    SharedArray<uint32_t>(shared.digest()).set(0, 0u);
    SharedArray<uint32_t>(shared.disagrees()).set(0, 0u);
    SharedArray<uint32_t>(shared.failed()).set(0, 0u);
  }
  return {args, args.two_level, args.two_level.all, {args.combine, near, epoch, deadline}};
}

/// Of the handle's counts, those that concern this rank, and a digest of all, into shared memory. Whole block;
/// what warp 0 alone needs, which posts and waits for digests, it has behind it, others behind wait_digests.
DEEPEP_DEVICE void read_counts(const TwoLevelCombineCall& call) {
  using namespace dev;
  const int ranks = call.all.num_ranks;
  const TwoLevelCombineShared shared = shared_of(call.args);
  SharedArray<int32_t> sends(shared.sends());
  SharedArray<int32_t> receives(shared.receives());
  SharedArray<int32_t> first_rows(shared.first_rows());
  uint32_t sum = 0;
  for (int i = thread(); i < ranks * ranks; i += num_threads()) {
    const int32_t count = load_once(call.args.combine.counts + i);
    Digest place;
    place.add(static_cast<uint32_t>(i));
    place.add(static_cast<uint32_t>(count));
    sum += place.value;
    if (i / ranks == call.all.rank) sends.set(i % ranks, count);
    if (i % ranks == call.all.rank) receives.set(i / ranks, count);
  }
  SharedArray<uint32_t>(shared.digest()).add(0, sum);
  sync_block();
  if (warp() == 0) {
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < ranks; first += kWarpSize) {
      const int source = first + lane();
      const int count = source < ranks ? receives.get(source) : 0;
      const int earlier = before + warp_exclusive_sum(count);
      if (source < ranks) first_rows.set(source, earlier);
      before += warp_sum(count);
    }
  }
}

[[nodiscard]] DEEPEP_DEVICE bool is_first_block() { return dev::block() == 0; }

/// What a rank posts: one warp to the neighbours, a lane each.
DEEPEP_DEVICE void post_near(const CombineCall& near, int source, uint32_t digest, uint32_t tokens) {
  using namespace dev;
  const Group& g = near.g;
  if (lane() >= g.num_ranks || !is_live(g, lane())) return;
  store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_digest(source, near.epoch)),
                            pack_tagged(digest, near.epoch));
  store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_tokens(source, near.epoch)),
                            pack_tagged(tokens, near.epoch));
}

/// The digest of what all ranks must pass alike, as in one level: behind read_counts. A refusal where this rank
/// takes no part, which no rank agrees with.
[[nodiscard]] DEEPEP_DEVICE uint32_t digest_of(const TwoLevelCombineCall& call) {
  const CombineArgs& args = call.args.combine;
  if (args.mode == CombineMode::kRefused) return kRefusal;
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  DEEPEP_ROLLED
  for (int word = 0; word < layout::kMaskWords; ++word) digest.add(call.all.live.words[word]);
  digest.add(dev::SharedArray<uint32_t>(shared_of(call.args).digest()).get(0));
  return digest.value | 1u;
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
  post_near(call.near, call.all.rank, digest, tokens);
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
      came = wait_signal<acquire, sys_scope>(raised, wanted, call.near.deadline);
      if (!came) note_late(call.near.g, Phase::kReturn, rails.peer[rail], wanted, raised);
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

/// A rank's digest and T, which is returned; -1 if they do not come, or agree with this rank's digest.
[[nodiscard]] DEEPEP_DEVICE int64_t wait_digest(const TwoLevelCombineCall& call, int source, uint32_t digest) {
  using namespace dev;
  const Group& g = call.near.g;
  const uint32_t epoch = call.near.epoch;
  const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_digest(source, epoch));
  uint32_t seen = 0, tokens = 0;
  if (!wait_tag<relaxed, sys_scope>(word, epoch, call.near.deadline, seen)) {
    note_rank(g, Phase::kReturn, source, epoch, unpack_tagged(load<relaxed, sys_scope>(word)).tag);
    return -1;
  }
  if (seen != digest || digest == kRefusal) {
    note_rank(g, Phase::kDisagreement, source, digest, seen);
    return -1;
  }
  word = at<uint64_t>(g, g.rank, g.control.combine_tokens(source, epoch));
  if (!wait_tag<acquire, sys_scope>(word, epoch, call.near.deadline, tokens)) {
    note_rank(g, Phase::kReturn, source, epoch, 0);
    return -1;
  }
  return tokens;
}

/// The digests of all live ranks, and their T, into shared memory. Whole block; whether all agree.
[[nodiscard]] DEEPEP_DEVICE bool wait_digests(const TwoLevelCombineCall& call) {
  using namespace dev;
  const TwoLevelCombineShared shared = shared_of(call.args);
  SharedArray<uint32_t> tokens(shared.tokens());
  SharedArray<uint32_t> disagrees(shared.disagrees());
  if (warp() == 0) {
    const uint32_t digest = digest_of(call);
    for (int r = lane(); r < call.all.num_ranks; r += kWarpSize) {
      const int64_t seen = is_live(call.all, r) ? wait_digest(call, r, digest) : 0;
      tokens.set(r, static_cast<uint32_t>(layout::max_of(seen, int64_t{0})));
      if (seen < 0) disagrees.bit_or(0, 1u);
    }
  }
  sync_block();
  return disagrees.get(0) == 0;
}

[[nodiscard]] DEEPEP_DEVICE int64_t tokens_of(const TwoLevelCombineCall& call, int source) {
  return dev::SharedArray<uint32_t>(shared_of(call.args).tokens()).get(source);
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
  using namespace dev;
  if (!is_live(call.all, r) || SharedArray<int32_t>(shared_of(call.args).sends()).get(r) == 0) return false;
  return load_once(call.args.combine.send_row + t * call.all.num_ranks + r) >= 0;
}

/// Which of the chunk's tokens have a row at rank `first` + this lane's number: bit i of token i.
[[nodiscard]] DEEPEP_DEVICE uint32_t returning_tokens(const TwoLevelCombineCall& call,
                                                      const ChunkTokens& tokens, int first) {
  using namespace dev;
  uint32_t returning = 0;
  if (first + lane() >= call.all.num_ranks) return 0;
#pragma unroll 1
  for (int i = 0; i < tokens.size(); ++i)
    returning |= static_cast<uint32_t>(has_row(call, tokens.begin + i, first + lane())) << i;
  return returning;
}

/// The first of the rows that this rank has received from `source` whose token is `token` or a later one.
[[nodiscard]] DEEPEP_DEVICE int64_t first_row_from(const TwoLevelCombineCall& call, int source, int64_t token) {
  using namespace dev;
  const TwoLevelCombineShared shared = shared_of(call.args);
  int64_t low = SharedArray<int32_t>(shared.first_rows()).get(source);
  int64_t high = low + SharedArray<int32_t>(shared.receives()).get(source);
#pragma unroll 1
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load_once(call.args.source_token + middle) < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace deepep::kernels
