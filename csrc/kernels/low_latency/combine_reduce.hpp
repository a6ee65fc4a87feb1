// Rows of experts back to the owners of their tokens, one for each token: the phases of a combine that send.
#pragma once

#include "kernels/low_latency/combine_digest.hpp"
#include "kernels/low_latency/combine_stage.hpp"
#include "layout/low_latency_rows.hpp"

namespace deepep::kernels {

inline constexpr int kWeightUnroll = 2;  // weights that a thread has asked for at once

struct Weights {
  uint32_t weight[kWeightUnroll];
};

/// Weights first + thread, first + thread + threads, ... of [T, K].
[[nodiscard]] DEEPEP_DEVICE Weights load_weights(const LowLatencyCombineArgs& args, int first) {
  using namespace dev;
  Weights weights = {};
#pragma unroll
  for (int u = 0; u < kWeightUnroll; ++u) {
    const int i = first + u * num_threads() + thread();
    if (i < args.num_tokens * args.num_topk) weights.weight[u] = load_once(args.topk_weights + i);
  }
  return weights;
}

/// True where weights are posted: by block 0, if the dispatch carried none.
[[nodiscard]] DEEPEP_DEVICE bool posts_weights(const LowLatencyCombineArgs& args) {
  return dev::block() == 0 && !args.weights_travelled && !args.refused;
}

/// What is posted first: asked for before anything else.
[[nodiscard]] DEEPEP_DEVICE Weights first_weights(const LowLatencyCombineArgs& args) {
  return posts_weights(args) ? load_weights(args, 0) : Weights{};
}

/// Tagged words, all to each rank. An expert's rank finds them by token and entry; that a combine has other
/// indices than its dispatch keeps none from coming.
DEEPEP_DEVICE void post_weights(const LowLatencyCombineCall& call, Weights weights) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  if (!posts_weights(args)) return;
  const int end = args.num_tokens * args.num_topk;
  const int step = kWeightUnroll * num_threads();
#pragma unroll 1
  for (int first = 0; first < end; first += step) {
    DEEPEP_ROLLED
    for (int peer = 0; peer < g.num_ranks; ++peer) {
      if (!is_live(call, peer)) continue;
      uint64_t* words = at<uint64_t>(g, peer, args.slots.weights(call.epoch, g.rank));
#pragma unroll
      for (int u = 0; u < kWeightUnroll; ++u) {
        const int i = first + u * num_threads() + thread();
        if (i < end) store<relaxed, sys_scope>(words + i, pack_tagged(weights.weight[u], call.epoch));
      }
    }
    weights = load_weights(args, first + step);
  }
}

/// Which tokens' rows go back: those that came, but of a rank that is masked, and none of what a dispatch that
/// failed has left in the handle. All threads, with a barrier.
DEEPEP_DEVICE void list_returns(const LowLatencyCombineCall& call, const CombineBefore& before) {
  using namespace dev;
  const LowLatencyCombineShared shared = call.shared();
  SharedArray<uint32_t> tokens(shared.tokens());
  enter(call.lines, Step::kCount);
  uint32_t came = before.came;
  DEEPEP_ROLLED
  for (int i = thread(); i < shared.num_ranks * shared.token_words; i += num_threads()) {
    const bool any = before.identity != 0 && is_live(call, i / shared.token_words);
    tokens.set(i, any ? came : 0);
    came = load_came(call.args, i + num_threads());
  }
  sync_block();
}

[[nodiscard]] DEEPEP_DEVICE Presence present_of(const LowLatencyCombineCall& call) {
  const LowLatencyCombineShared shared = call.shared();
  return {dev::SharedArray<uint32_t>(shared.tokens()), shared.token_words};
}

/// A message on its way back. Lane k: its k-th entry's.
struct Return {
  MessageAt where;
  uint32_t rows;     // entries that have a row, as bits; 0: there is no such message
  uint64_t address;  // of the row
};

[[nodiscard]] DEEPEP_DEVICE const uint32_t* route_of(const LowLatencyCombineArgs& args,
                                                     const MessageAt& where) {
  return args.handle.routes + (int64_t{where.source} * args.max_tokens + where.token) *
                                  layout::LowLatencyMessage::header_words(args.num_topk);
}

/// Lane k: a message's k-th entry.
[[nodiscard]] DEEPEP_DEVICE uint32_t load_route(const LowLatencyCombineArgs& args, const MessageAt& where) {
  using namespace dev;
  if (where.token < 0 || lane() >= args.num_topk) return layout::kNoEntry;
  return load_once(route_of(args, where) + lane());
}

/// The first message that this warp's team has if it came, before it is known whether it did.
struct Likely {
  MessageAt where;
  uint32_t entry;  // lane k: the k-th, or what lies there if the message did not come
};

[[nodiscard]] DEEPEP_DEVICE Likely first_route(const LowLatencyCombineArgs& args) {
  using namespace dev;
  if (args.refused) return {{0, -1}, layout::kNoEntry};
  const Team team = team_of_warp(args.share.message_shift);
  const MessageAt where = message_at(args, item_of_block(block(), team.number, args.share.first_worker));
  if (where.token < 0 || lane() >= args.num_topk) return {where, layout::kNoEntry};
  return {where, load_guess(route_of(args, where) + lane())};
}

/// One warp. Nothing if there is no such message. Lane k: its k-th entry.
[[nodiscard]] DEEPEP_DEVICE Return find_return(const LowLatencyCombineCall& call, const MessageAt& where,
                                               uint32_t entry) {
  const LowLatencyCombineArgs& args = call.args;
  if (where.token < 0) return {where, 0, 0};
  const bool has_row = entry != layout::kNoEntry;
  const int64_t row = has_row ? layout::packed_row(call.g.num_ranks, args.max_tokens,
                                                   layout::entry_expert(entry), layout::entry_row(entry))
                              : 0;
  return {where, dev::ballot(has_row), reinterpret_cast<uint64_t>(args.x + row * args.hidden * 2)};
}

/// Part number `part` of 2^shift.
[[nodiscard]] DEEPEP_DEVICE Pieces pieces_of(const LowLatencyCombineCall& call, int part, int shift) {
  const int pieces = call.args.hidden / 8;
  return {(pieces * part) >> shift, (pieces * (part + 1)) >> shift};
}

/// This warp's of a message.
[[nodiscard]] DEEPEP_DEVICE Pieces pieces_of_message(const LowLatencyCombineCall& call) {
  const int shift = call.args.share.message_shift;
  return pieces_of(call, team_of_warp(shift).part, shift);
}

/// Has this warp's part of a message's rows fetched: they are not used before the weights are here.
DEEPEP_DEVICE void prefetch_rows(const Return& back, const Pieces& mine) {
  using namespace dev;
  if (((back.rows >> lane()) & 1u) != 0 && mine.begin < mine.end)
    prefetch(reinterpret_cast<const Vec16*>(back.address) + mine.begin, int64_t{16} * (mine.end - mine.begin));
}

/// The messages that a team returns.
struct Returning {
  MessageWalk<LowLatencyCombineArgs> walk;
  Return back;  // the one whose rows are on their way,
  bool staged;  // into the warp's stage
};

[[nodiscard]] DEEPEP_DEVICE Return next_return(const LowLatencyCombineCall& call, Returning& returning) {
  const MessageAt where = returning.walk.next();
  const Return back = find_return(call, where, load_route(call.args, where));
  prefetch_rows(back, pieces_of_message(call));
  return back;
}

/// Of this warp's team: the first one's rows are on their way.
[[nodiscard]] DEEPEP_DEVICE Returning first_return(const LowLatencyCombineCall& call, const Likely& likely) {
  Returning returning{walk_of(call, present_of(call), team_of_warp(call.args.share.message_shift)), {}, false};
  const MessageAt where = returning.walk.next();
  const bool is_likely = where.source == likely.where.source && where.token == likely.where.token;
  returning.back = find_return(call, where, is_likely ? likely.entry : load_route(call.args, where));
  const Pieces mine = pieces_of_message(call);
  returning.staged = stage_rows(call, returning.back.rows, returning.back.address, mine);
  if (!returning.staged) prefetch_rows(returning.back, mine);
  return returning;
}

/// Owners that the block has waited for in vain, as bits. An atomic: warps may go on and note what they miss.
[[nodiscard]] DEEPEP_DEVICE uint32_t lost_owners(const LowLatencyCombineCall& call) {
  return dev::SharedArray<uint32_t>(call.shared().lost()).bit_or(0, 0u);
}

/// How often a weight is looked for by itself. Then its owner is late, and may have refused its call: all warps
/// of all blocks wait for the one word that says so, which costs them more than to look at a weight each.
inline constexpr int kWeightLooks = 16;

/// Waits for a weight that comes with the combine; none does of an owner that has not said that it combines
/// alike.
[[nodiscard]] DEEPEP_DEVICE bool wait_weight(const LowLatencyCombineCall& call, int owner, int number,
                                             uint32_t& weight) {
  const layout::LowLatencySlots& slots = call.args.slots;
  const int64_t word = slots.weights(call.epoch, owner) + int64_t{8} * number;
#pragma unroll 1
  for (int i = 0; i < kWeightLooks; ++i)
    if (has_word(call, word, weight)) return true;
  const int64_t digest = slots.digests(call.epoch, owner) + 8 * Digests::kShapes;
  uint32_t said = 0;
  return wait_word(call, digest, owner, Phase::kCounts, said) && said == call.args.share.digest &&
         wait_word(call, word, owner, Phase::kWeights, weight);
}

/// The rows of a message with their weights. One warp; none if a weight does not come in time, or its owner
/// posts none.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE SumRows weighted_rows(const Call& call, const Return& back) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const MessageAt& where = back.where;
  const bool has_row = (back.rows >> lane()) & 1u;
  uint32_t weight = 0;
  bool came = true;
  if (has_row && args.weights_travelled) weight = load_once(route_of(args, where) + args.num_topk + lane());
  if (call.masks && ((lost_owners(call) >> where.source) & 1u)) {
    came = false;
  } else if (has_row && !args.weights_travelled) {
    came = wait_weight(call, where.source, where.token * args.num_topk + lane(), weight);
  }
  return {ballot(!came) != 0 ? 0 : back.rows, back.address, float_of_bits(weight)};
}

/// One of an owner's. By one warp.
DEEPEP_DEVICE void note_missing_weight(const LowLatencyCombineCall& call, int owner) {
  using namespace dev;
  if (lane() != 0) return;
  SharedArray<uint32_t>(call.shared().lost()).bit_or(0, 1u << owner);
  SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kWeights));
}

/// Where the row that goes back of a message is written, in whose owner's slots its place is `offset`.
[[nodiscard]] DEEPEP_DEVICE dev::Vec16* return_to(const LowLatencyCombineCall& call, const MessageAt& where,
                                                  int64_t offset) {
  return at<dev::Vec16>(call.g, where.source, offset);
}

/// A part of a message's rows to one, in the memory of the token's owner. One warp. False if a weight does not
/// come, and no other is to be waited for: the deadline has passed.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool reduce_message(const Call& call, const Return& back, bool staged) {
  using namespace dev;
  enter(call.lines, Step::kWaitWeights);
  const SumRows rows = weighted_rows(call, back);
  enter(call.lines, Step::kPushRows);
  if (staged) wait_stage(call);
  if (rows.rows == 0) {
    note_missing_weight(call, back.where.source);
    return call.masks;
  }
  const int64_t row_bytes = int64_t{2} * call.args.hidden;
  Vec16* out = return_to(call, back.where,
                         call.args.slots.returns(call.epoch, call.g.rank) + back.where.token * row_bytes);
  const Pieces mine = pieces_of_message(call);
  if (staged)
    sum_stage(call, out, rows, mine);
  else
    sum_rows<true>(out, rows, mine.begin, mine.end);
  return true;
}

/// The block's messages.
template <class Call>
DEEPEP_DEVICE void reduce_messages(const Call& call, Returning returning) {
#pragma unroll 1
  while (returning.back.rows != 0) {
    const Return back = returning.back;
    const bool staged = returning.staged;
    returning.back = next_return(call, returning);
    returning.staged = false;
    if (!reduce_message(call, back, staged)) return;
  }
}

/// The flags of the block's rows, a lane each, by the last warp: behind a block barrier, which orders the rows
/// of all warps before them. None if one of them was not made; with masks, none to its owner.
template <class Call>
DEEPEP_DEVICE void signal_returns(const Call& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  const uint32_t lost = lost_owners(call);
  if (!is_signaller() || (lost != 0 && !call.masks)) return;
  enter(call.lines, Step::kSignal);
  auto walk = walk_of(call, present_of(call), {.number = lane(), .teams = kWarpSize, .part = 0, .parts = 1});
#pragma unroll 1
  for (MessageAt where = walk.next(); where.token >= 0; where = walk.next()) {
    if ((lost >> where.source) & 1u) continue;
    if constexpr (Call::kIsFar)  // a condition that always holds would change the code of calls inside a domain
      if (!is_mapped(call, where.source)) continue;
    uint32_t* flags = at<uint32_t>(g, where.source, args.slots.return_flags(call.epoch, g.rank));
    store<release, sys_scope>(flags + where.token, call.epoch);
  }
}

}  // namespace deepep::kernels
