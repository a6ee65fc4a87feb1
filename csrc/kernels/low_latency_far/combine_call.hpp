// A low-latency combine between domains as its blocks see it: with ranks of this domain as inside one, with the
// others by puts. What is put lies in the order of the tokens: of those that a rank's owner sent to it, so both
// sides know the places.
#pragma once

#include "kernels/low_latency/combine_reduce.hpp"
#include "kernels/low_latency/combine_sum.hpp"
#include "kernels/low_latency_far/puts.hpp"

namespace deepep::kernels {

/// The block's words behind those of a combine inside a domain.
struct FarCombineShared {
  int64_t begin;
  int num_ranks;
  int token_words;
  int count_words;  // where each entry has a row: of as many tokens, a byte each; else 0

  [[nodiscard]] DEEPEP_HD int64_t sent() const { return begin; }  // uint32: Sent
  /// uint32 [R, token words]: this rank's tokens that went to each rank, as bits.
  [[nodiscard]] DEEPEP_HD int64_t went() const { return begin + 16; }
  /// uint32 [R, count words]: rows that come back of each of this rank's tokens from each rank,
  [[nodiscard]] DEEPEP_HD int64_t rows_that_went() const { return went() + 4 * num_ranks * token_words; }
  /// and those that go back of each that came.
  [[nodiscard]] DEEPEP_HD int64_t rows_that_came() const {
    return rows_that_went() + 4 * num_ranks * count_words;
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return layout::align_up(rows_that_came() + 4 * num_ranks * count_words, 16);
  }
};

[[nodiscard]] DEEPEP_HD FarCombineShared far_shared_of(const LowLatencyCombineArgs& args) {
  const LowLatencyCombineShared near = shared_of(args);
  const int count_words = returns_entries(args) ? (args.max_tokens + 3) / 4 : 0;
  return {near.bytes(), near.num_ranks, near.token_words, count_words};
}

struct FarCombineCall : LowLatencyCombineCall {
  static constexpr bool kIsFar = true;

  const FarRanks& far;
  FarTurn turn;

  [[nodiscard]] DEEPEP_DEVICE FarCombineShared far_shared() const { return far_shared_of(args); }
  [[nodiscard]] DEEPEP_DEVICE const LowLatencyCombineCall& near() const { return *this; }
};

/// Between domains kernels mask nobody, which the compiler is to know: what masks take would spill registers.
[[nodiscard]] DEEPEP_DEVICE LowLatencyCombineCall without_masks(LowLatencyCombineCall call) {
  call.masks = false;
  return call;
}

/// Of a launch that sends. All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE FarCombineCall start(const FarCombineArgs& args, const CombineBefore& before,
                                                 uint32_t ranks, bool watching) {
  const LowLatencyCombineArgs& near = args;
  return {without_masks(start(near, before, ranks, watching)), args.far,
          turn_of(dev::load(&args.far.state->combines))};
}

/// Of a launch that only receives: what its send has left.
[[nodiscard]] DEEPEP_DEVICE FarCombineCall start_receive(const FarCombineArgs& args, uint32_t ranks,
                                                         bool watching) {
  const LowLatencyCombineArgs& near = args;
  const uint64_t sent = dev::load_once(&args.far.state->combines);
  return {without_masks(start_receive(near, ranks, watching)), args.far, turn_of(sent - 1)};
}

/// This rank's tokens that went to far ranks. A warp has 32 tokens at a time. All threads, with a barrier.
DEEPEP_DEVICE void list_sent(const FarCombineCall& call) {
  using namespace dev;
  const FarCombineShared shared = call.far_shared();
  SharedArray<uint32_t> went(shared.went());
#pragma unroll 1
  for (int word = warp(); word < shared.token_words; word += num_warps()) {
    const uint32_t ranks = ranks_of(call.args, word * kWarpSize + lane());
#pragma unroll 1
    for (uint32_t far = call.far.bits; far != 0; far &= far - 1) {
      const int rank = lowest_bit(far);
      const uint32_t tokens = ballot(((ranks >> rank) & 1u) != 0);
      if (lane() == 0) went.set(rank * shared.token_words + word, tokens);
    }
  }
  sync_block();
}

/// The place of this rank's token among those that went to a far rank.
[[nodiscard]] DEEPEP_DEVICE int place_of_sent(const FarCombineCall& call, int rank, int token) {
  const FarCombineShared shared = call.far_shared();
  return tokens_before(dev::SharedArray<uint32_t>(shared.went()), rank * shared.token_words, token);
}

/// And of a far rank's among those that came from it.
[[nodiscard]] DEEPEP_DEVICE int place_of_came(const FarCombineCall& call, int source, int token) {
  const Presence present = present_of(call);
  return tokens_before(present.bits, source * present.words, token);
}

/// Tokens of such a row.
[[nodiscard]] DEEPEP_DEVICE int count_tokens(dev::SharedArray<uint32_t> bits, int first, int words) {
  int count = 0;
  DEEPEP_ROLLED
  for (int word = 0; word < words; ++word) count += dev::popcount(bits.get(first + word));
  return count;
}

[[nodiscard]] DEEPEP_DEVICE uint64_t* digests_to(const FarCombineCall& call, int rank, int64_t offset) {
  return is_mapped(call, rank)
             ? digests_to(call.near(), rank, offset)
             : leaving_for<uint64_t>(call.far, call.turn, rank, call.far.slots.digests());
}

/// A far rank's digests come with its weights, once both are known.
[[nodiscard]] DEEPEP_DEVICE bool wait_digest(const FarCombineCall& call, int64_t offset, int source, int word,
                                             uint32_t& value) {
  using namespace dev;
  if (is_mapped(call, source)) return wait_digest(call.near(), offset, source, word, value);
  if (!wait_put(call, FarPut::kDigests, source, Phase::kCounts)) return false;
  const auto* digests = arrived_at<uint64_t>(call.far, call.turn, source, call.far.slots.digests());
  value = unpack_tagged(load(digests + word)).value;
  return true;
}

/// Whether they have come. It orders nothing.
[[nodiscard]] DEEPEP_DEVICE bool has_posted(const FarCombineCall& call, int source) {
  return has_put(call, FarPut::kDigests, source);
}

}  // namespace deepep::kernels
