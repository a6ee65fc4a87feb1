// A low-latency combine in two levels as its blocks see it: with ranks of this domain as inside one; rows of
// other domains' tokens go to their gateway here, which sums them and puts one for each token.
#pragma once

#include "kernels/low_latency_far/combine_arrive.hpp"
#include "kernels/low_latency_far/combine_put.hpp"
#include "kernels/low_latency_rails/rails.hpp"

namespace deepep::kernels {

/// The block's words behind those of a combine between domains.
struct RailCombineShared {
  int64_t begin;
  int num_ranks;
  int token_words;

  /// uint32 [R, token words]: tokens of ranks along rails that have rows in this domain, as bits.
  [[nodiscard]] DEEPEP_HD int64_t relayed() const { return begin; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return layout::align_up(begin + 4 * num_ranks * token_words, 16);
  }
};

[[nodiscard]] DEEPEP_HD RailCombineShared rail_shared_of(const LowLatencyCombineArgs& args) {
  const FarCombineShared far = far_shared_of(args);
  return {far.bytes(), far.num_ranks, far.token_words};
}

struct RailCombineCall : FarCombineCall {
  static constexpr bool kIsRail = true;

  const RailDomain& domain;

  [[nodiscard]] DEEPEP_DEVICE RailCombineShared rail_shared() const { return rail_shared_of(args); }
  [[nodiscard]] DEEPEP_DEVICE Presence relayed() const {
    return {dev::SharedArray<uint32_t>(rail_shared().relayed()), rail_shared().token_words};
  }
  /// With those alone to whom this rank posts: of this domain, and along rails.
  [[nodiscard]] DEEPEP_DEVICE RailCombineCall posting() const {
    RailCombineCall call = *this;
    call.live &= neighbours_of(domain) | far.bits;
    return call;
  }
};

/// All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE RailCombineCall start(const RailCombineArgs& args, const CombineBefore& before,
                                                  uint32_t ranks, bool watching) {
  const FarCombineArgs& far = args;
  return {start(far, before, ranks, watching), args.domain};
}

/// The ranks of this domain that a token went to whose gateway this rank is, as bits from the first on.
[[nodiscard]] DEEPEP_DEVICE uint32_t load_relayed(const RailCombineCall& call, int source, int token) {
  return dev::load_once(relayed_of(call.args) +
                        int64_t{domain_of(call.domain, source)} * call.args.max_tokens + token);
}

/// The tokens that this rank was gateway of, none of a dispatch that failed. A warp has 32 tokens at a time. A
/// block barrier has to follow.
DEEPEP_DEVICE void list_relayed(const RailCombineCall& call, const CombineBefore& before) {
  using namespace dev;
  const Presence relayed = call.relayed();
  SharedArray<uint32_t> bits = relayed.bits;
  const bool has_any = before.identity != 0 && !call.args.refused;
#pragma unroll 1
  for (int word = warp(); word < relayed.words; word += num_warps()) {
    const int t = word * kWarpSize + lane();
#pragma unroll 1
    for (uint32_t rails = call.far.bits; rails != 0; rails &= rails - 1) {
      const int source = lowest_bit(rails);
      const bool has_row = has_any && t < call.args.max_tokens && load_relayed(call, source, t) != 0;
      const uint32_t tokens = ballot(has_row);
      if (lane() == 0) bits.set(source * relayed.words + word, tokens);
    }
  }
}

/// Rows that leave for a rank along a rail: one for each of its tokens that this rank was gateway of.
[[nodiscard]] DEEPEP_DEVICE int64_t bytes_of_rows(const RailCombineCall& call, int rank) {
  const Presence relayed = call.relayed();
  return count_tokens(relayed.bits, rank * relayed.words, relayed.words) * int64_t{2} * call.args.hidden;
}

/// By block 0: digests to those alone; others get them by gateways.
DEEPEP_DEVICE void post_shapes(const RailCombineCall& call) { post_shapes<RailCombineCall>(call.posting()); }
DEEPEP_DEVICE void post_indices(const RailCombineCall& call) { post_indices<RailCombineCall>(call.posting()); }

/// All ranks' come as inside a domain.
DEEPEP_DEVICE void measure_owners(const RailCombineCall& call) { measure_owners(call.near()); }
[[nodiscard]] DEEPEP_DEVICE bool wait_partners(const RailCombineCall& call) {
  return wait_partners(call.near());
}

/// By block 0, where the dispatch carried none: all weights to the ranks of this domain.
DEEPEP_DEVICE void post_weights(const RailCombineCall& call, const Weights& weights) {
  LowLatencyCombineCall near = call.near();
  near.live &= neighbours_of(call.domain);
  post_weights(near, weights);
}

/// Weights come as inside a domain: those from others are relayed.
[[nodiscard]] DEEPEP_DEVICE bool wait_weight(const RailCombineCall& call, int owner, int number,
                                             uint32_t& weight) {
  return wait_weight(call.near(), owner, number, weight);
}

/// Where a row for a token of `owner` is written: with the owner itself, or with its gateway, in the stretch of
/// that rank of the owner's domain whose local index this rank has. That rank stores nothing there, being of
/// another domain, and no other rank of this one does.
struct ReturnStretch {
  int rank;
  int source;
};

[[nodiscard]] DEEPEP_DEVICE ReturnStretch stretch_for(const RailCombineCall& call, int owner) {
  const RailDomain& own = call.domain;
  if (is_neighbour(own, owner)) return {owner, call.g.rank};
  const int local = local_index(own, call.g.rank);
  return {own.first + local_index(own, owner), domain_of(own, owner) * own.num_ranks + local};
}

[[nodiscard]] DEEPEP_DEVICE dev::Vec16* return_to(const RailCombineCall& call, const MessageAt& where,
                                                  int64_t) {
  const ReturnStretch to = stretch_for(call, where.source);
  const int64_t rows = call.args.slots.returns(call.epoch, to.source);
  return at<dev::Vec16>(call.g, to.rank, rows + where.token * int64_t{2} * call.args.hidden);
}

/// The flags of the block's rows, a lane each, by the last warp, behind a block barrier. None if one of them
/// was not made.
DEEPEP_DEVICE void signal_returns(const RailCombineCall& call) {
  using namespace dev;
  if (!is_signaller() || lost_owners(call) != 0) return;
  auto walk = walk_of(call, present_of(call), {.number = lane(), .teams = kWarpSize, .part = 0, .parts = 1});
#pragma unroll 1
  for (MessageAt where = walk.next(); where.token >= 0; where = walk.next()) {
    const ReturnStretch to = stretch_for(call, where.source);
    uint32_t* flags = at<uint32_t>(call.g, to.rank, call.args.slots.return_flags(call.epoch, to.source));
    store<release, sys_scope>(flags + where.token, call.epoch);
  }
}

}  // namespace deepep::kernels
