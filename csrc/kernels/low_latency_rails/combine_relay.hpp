// What a rank does as gateway in a combine: it relays digests and weights, and sums its domain's rows.
#pragma once

#include "kernels/low_latency_rails/combine_call.hpp"

namespace deepep::kernels {

/// The weights of an owner along a rail to the ranks of this domain, which find them by token and entry.
DEEPEP_DEVICE void relay_weights(const RailCombineCall& call, int owner) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Presence relayed = call.relayed();
  const auto* weights = arrived_at<uint32_t>(call.far, call.turn, owner, call.far.slots.weights());
#pragma unroll 1
  for (int t = warp(); t < args.max_tokens; t += num_warps()) {
    if (!relayed.has(owner, t) || lane() >= args.num_topk) continue;
    const int place = tokens_before(relayed.bits, owner * relayed.words, t);
    const uint64_t word = pack_tagged(load(weights + place * args.num_topk + lane()), call.epoch);
#pragma unroll 1
    for (int rank = 0; rank < call.domain.num_ranks; ++rank) {
      auto* there = at<uint64_t>(call.g, call.domain.first + rank, args.slots.weights(call.epoch, owner));
      store<relaxed, sys_scope>(there + t * args.num_topk + lane(), word);
    }
  }
}

/// By block 0: the digests of ranks along rails to the ranks of this domain, and where they combine alike their
/// weights. What does not come is missed by all of them. A gateway that knows of no tokens, since it refuses or
/// its dispatch failed, cannot relay weights: it relays a refusal, or its neighbours would wait for them.
DEEPEP_DEVICE void relay_digests(const RailCombineCall& call, const CombineBefore& before) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const bool knows = !args.refused && before.identity != 0;
  if (block() != 0) return;
  SharedArray<uint32_t> came(call.far_shared().sent());  // put_returns' later, behind a barrier
  if (warp() == 0) {
    const bool is_mine = puts_to(call, lane());
    const bool has_come = is_mine && wait_put(call, FarPut::kDigests, lane(), Phase::kCounts);
    const uint32_t ranks = ballot(has_come);
    if (is_mine && !has_come)
      SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    if (lane() == 0) came.set(0, ranks);
  }
  sync_block();
#pragma unroll 1
  for (uint32_t rails = came.get(0); rails != 0; rails &= rails - 1) {
    const int owner = lowest_bit(rails);
    const auto* digests = arrived_at<uint64_t>(call.far, call.turn, owner, call.far.slots.digests());
    const uint32_t shapes = unpack_tagged(load(digests + Digests::kShapes)).value;
    const bool is_absent = shapes == kRefusal || shapes == kElsewhere;
    const uint64_t said = pack_tagged(knows || is_absent ? shapes : kRefusal, call.epoch);
    for (int i = thread(); i < call.domain.num_ranks * Digests::kCount; i += num_threads()) {
      auto* there =
          at<uint64_t>(call.g, call.domain.first + i / Digests::kCount, args.slots.digests(call.epoch, owner));
      const int word = i % Digests::kCount;
      store<relaxed, sys_scope>(there + word, word == Digests::kShapes ? said : load(digests + word));
    }
    if (knows && shapes == args.share.digest && !args.weights_travelled) relay_weights(call, owner);
  }
}

/// One row for a rank along a rail: those of this domain's ranks, summed in their order and rounded. One warp.
/// False if one does not come, which is a fault.
[[nodiscard]] DEEPEP_DEVICE bool sum_domain_row(const RailCombineCall& call, int owner, int token, int place) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const int64_t row_bytes = int64_t{2} * args.hidden;
  const uint32_t ranks = load_relayed(call, owner, token);
  SumRows rows{ranks, 0, 0.0f};
  bool came = true;
  if (((ranks >> lane()) & 1u) != 0) {
    const int stretch = domain_of(call.domain, owner) * call.domain.num_ranks + lane();
    const auto* flags = at<uint32_t>(call.g, call.g.rank, args.slots.return_flags(call.epoch, stretch));
    came = wait_flag(call.near(), flags + token, call.domain.first + lane(), Phase::kReturn);
    rows.address = reinterpret_cast<uint64_t>(
        at<std::byte>(call.g, call.g.rank, args.slots.returns(call.epoch, stretch) + token * row_bytes));
  }
  if (ballot(!came) != 0) return false;
  sync_warp();  // the lanes' acquires come before the whole warp's reads
  auto* out = leaving_for<Vec16>(call.far, call.turn, owner, call.far.slots.rows() + place * row_bytes);
  sum_rows<false>(out, rows, 0, args.hidden / 8);
  return true;
}

/// What this rank is gateway of; the warps of all blocks have it in turn. If ranks disagree no row is made.
DEEPEP_DEVICE void sum_domain_rows(const RailCombineCall& call, bool agreed) {
  using namespace dev;
  if (!agreed) {
    if (thread() == 0) SharedArray<uint32_t>(call.shared().lost()).bit_or(0, call.far.bits);
    return;
  }
  WarpTurns turns = WarpTurns::begin();
  const Presence relayed = call.relayed();
#pragma unroll 1
  for (uint32_t rails = call.far.bits & call.live; rails != 0; rails &= rails - 1) {
    const int owner = lowest_bit(rails);
    int place = 0;
#pragma unroll 1
    for (int t = 0; t < call.args.max_tokens; ++t) {
      if (!relayed.has(owner, t)) continue;
      if (turns.is_mine() && !sum_domain_row(call, owner, t, place)) {
        if (lane() != 0) return;
        SharedArray<uint32_t>(call.shared().lost()).bit_or(0, 1u << owner);
        SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kReturn));
        return;  // the deadline has passed
      }
      ++place;
    }
  }
}

}  // namespace deepep::kernels
