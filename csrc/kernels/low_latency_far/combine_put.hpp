// Rows to the owners of tokens in other domains: the phases of a combine that stage and put them.
#pragma once

#include "kernels/low_latency_far/combine_rows.hpp"

namespace deepep::kernels {

/// By block 0, where the dispatch carried none: all weights to the ranks of this domain.
DEEPEP_DEVICE void post_weights(const FarCombineCall& call, const Weights& weights) {
  LowLatencyCombineCall near = call.near();
  near.live &= ~call.far.bits;
  post_weights(near, weights);
}

/// The same of each token, to leave for the far ranks that it went to. A warp a token.
DEEPEP_DEVICE void stage_weights(const FarCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  if (!posts_weights(args)) return;
#pragma unroll 1
  for (int t = warp(); t < args.num_tokens; t += num_warps()) {
    const bool has_entry = lane() < args.num_topk;
    const uint32_t weight = has_entry ? load_once(args.topk_weights + t * args.num_topk + lane()) : 0;
#pragma unroll 1
    for (uint32_t ranks = ranks_of(args, t) & call.far.bits & call.live; ranks != 0; ranks &= ranks - 1) {
      const int rank = lowest_bit(ranks);
      auto* weights = leaving_for<uint32_t>(call.far, call.turn, rank, call.far.slots.weights());
      if (has_entry) store(weights + place_of_sent(call, rank, t) * args.num_topk + lane(), weight);
    }
  }
}

/// By block 0: to each far rank this rank's digests, and weights with them where they come with the combine. A
/// lane has stored the digests that it puts; the weights lie behind barriers of the block.
DEEPEP_DEVICE void put_digests(const FarCombineCall& call) {
  using namespace dev;
  if (block() != 0 || warp() != 0 || !puts_to(call, lane())) return;
  const FarCombineShared shared = call.far_shared();
  const layout::LowLatencyFarSlots& slots = call.far.slots;
  int64_t weights = 0;
  if (posts_weights(call.args) && !returns_entries(call.args))
    weights = int64_t{call.args.num_topk} * count_tokens(SharedArray<uint32_t>(shared.went()),
                                                         lane() * shared.token_words, shared.token_words);
  put_stretch(call, FarPut::kDigests, lane(), slots.digests(), slots.weights() - slots.digests() + 4 * weights);
}

/// Waits for a weight that a far rank has put behind its digests.
[[nodiscard]] DEEPEP_DEVICE bool wait_weight(const FarCombineCall& call, int owner, int number,
                                             uint32_t& weight) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  if (is_mapped(call, owner)) return wait_weight(call.near(), owner, number, weight);
  uint32_t said = 0;
  if (!wait_digest(call, 0, owner, Digests::kShapes, said) || said != args.share.digest) return false;
  const int token = args.share.by_topk.quotient(number);
  const auto* weights = arrived_at<uint32_t>(call.far, call.turn, owner, call.far.slots.weights());
  weight = load(weights + place_of_came(call, owner, token) * args.num_topk + number - token * args.num_topk);
  return true;
}

/// What goes back to a far rank: its rows, with the rests of those in LogFMT, which all blocks have counted.
[[nodiscard]] DEEPEP_DEVICE int64_t bytes_of_rows(const FarCombineCall& call, int rank) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const int64_t rows = rows_to(call, rank);
  if (args.returned == Returned::kSums || args.returned == Returned::kEntries) return rows * 2 * args.hidden;
  const layout::FarLogfmtRow lies{args.hidden};
  return rows * lies.bytes() + int64_t{load(call.far.state->rests + rank)} * lies.rest_bytes();
}

/// By the last block that has stored its rows, behind a block barrier: to each far rank the rows of its tokens,
/// and whether all of them were made. Whole block.
template <class Call>
DEEPEP_DEVICE void put_returns(const Call& call) {
  using namespace dev;
  FarState* state = call.far.state;
  SharedArray<uint32_t> sent(call.far_shared().sent());
  if (thread() == 0) sent.set(0, static_cast<uint32_t>(count_sent(state, lost_owners(call) != 0)));
  sync_block();
  if (warp() != 0 || sent.get(0) == static_cast<uint32_t>(Sent::kSome)) return;
  const bool has_all = sent.get(0) == static_cast<uint32_t>(Sent::kAll);
  if (puts_to(call, lane())) {
    const layout::LowLatencyFarSlots& slots = call.far.slots;
    store(leaving_for<Vec16>(call.far, call.turn, lane(), slots.returns()),
          Vec16{{has_all ? call.epoch : 0u, 0, 0, 0}});
    put_stretch(call, FarPut::kReturns, lane(), slots.returns(),
                slots.rows() - slots.returns() + (has_all ? bytes_of_rows(call, lane()) : 0));
    store(state->rests + lane(), 0u);
  }
  sync_warp();  // the wire is closed behind all puts
  if (lane() != 0) return;
  store(&state->combines, static_cast<uint64_t>(call.turn.number) + 1);
  close_wire(call.far.wire);
}

}  // namespace deepep::kernels
