// Messages to ranks of other domains: the phases of a dispatch that place and put them.
#pragma once

#include "kernels/low_latency_far/dispatch_call.hpp"

namespace deepep::kernels {

/// Which ranks this lane's token goes to, as bits.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of_token(const Call& call, int t, int end) {
  uint32_t ranks = 0;
  if (t >= end) return 0;
  DEEPEP_ROLLED
  for (int k = 0; k < call.args.num_topk; ++k) {
    const int owner = hop_to(call, owner_of(call.args, expert_at(call.args, t * call.args.num_topk + k)));
    if (owner >= 0) ranks |= 1u << owner;
  }
  return ranks & call.live;
}

/// How many of the tokens before the block's go to each far rank, and where the block's own go. A warp has 32
/// tokens at a time. All threads, with a barrier.
template <class Call>
DEEPEP_DEVICE void place_messages(const Call& call) {
  using namespace dev;
  const FarDispatchShared shared = call.far_shared();
  SharedArray<int32_t> before(shared.before());
  SharedArray<uint32_t> going(shared.going());
  const SentTokens& tokens = call.tokens;
#pragma unroll 1
  for (int begin = warp() * kWarpSize; begin < tokens.end; begin += num_warps() * kWarpSize) {
    const int t = begin + lane();
    const uint32_t ranks = ranks_of_token(call, t, tokens.end);
    if (t >= tokens.begin && t < tokens.end) going.set(t - tokens.begin, ranks);
    const uint32_t earlier = t < tokens.begin ? ranks : 0;
#pragma unroll 1
    for (uint32_t far = call.far.bits & call.live; far != 0; far &= far - 1) {
      const int rank = lowest_bit(far);
      const int count = popcount(ballot(((earlier >> rank) & 1u) != 0));
      if (lane() == 0 && count != 0) before.add(rank, count);
    }
  }
  sync_block();
}

/// Where a message of this rank's token t is written for a rank: for a far one, to leave from there.
[[nodiscard]] DEEPEP_DEVICE std::byte* message_to(const FarDispatchCall& call, int rank, int t,
                                                  int64_t offset) {
  using namespace dev;
  if (is_mapped(call, rank)) return message_to(call.near(), rank, t, offset);
  const FarDispatchShared shared = call.far_shared();
  SharedArray<uint32_t> going(shared.going());
  int place = SharedArray<int32_t>(shared.before()).get(rank);
#pragma unroll 1
  for (int i = 0; i < t - call.tokens.begin; ++i) place += (going.get(i) >> rank) & 1u;
  return leaving_for<std::byte>(call.far, call.turn, rank,
                                call.far.slots.messages() + place * call.message.bytes());
}

[[nodiscard]] DEEPEP_DEVICE uint64_t* words_for(const FarDispatchCall& call, int rank) {
  return leaving_for<uint64_t>(call.far, call.turn, rank, call.far.slots.words());
}
[[nodiscard]] DEEPEP_DEVICE uint64_t* words_to(const FarDispatchCall& call, int rank, int64_t offset) {
  return is_mapped(call, rank) ? words_to(call.near(), rank, offset) : words_for(call, rank);
}

/// Zeros into the words of a message that are nobody's: behind the header of an odd K, and behind its scales.
/// One warp.
DEEPEP_DEVICE void pad_message(const FarDispatchCall& call, std::byte* message) {
  using namespace dev;
  const layout::LowLatencyMessage& at = call.message;
  auto* words = reinterpret_cast<uint32_t*>(message);
  for (int64_t word = at.weight(at.num_topk) / 4 + lane(); word < at.row() / 4; word += kWarpSize)
    store(words + word, 0u);
  for (int64_t word = at.scales() / 4 + at.num_scales + lane(); word < at.bytes() / 4; word += kWarpSize)
    store(words + word, 0u);
}

/// The words of a put.
[[nodiscard]] DEEPEP_DEVICE int words_of_put(const FarDispatchCall& call) {
  return call.args.slots.words().count();
}

/// Nothing leaves that nobody wrote.
template <class Call>
DEEPEP_DEVICE void pad_messages(const Call& call) {
  using namespace dev;
  SharedArray<uint32_t> going(call.far_shared().going());
#pragma unroll 1
  for (int t = call.tokens.begin + warp(); t < call.tokens.end; t += num_warps())
#pragma unroll 1
    for (uint32_t ranks = going.get(t - call.tokens.begin) & call.far.bits; ranks != 0; ranks &= ranks - 1)
      pad_message(call, message_to(call, lowest_bit(ranks), t, 0));
  const int words = words_of_put(call);
  if (block() == 0 && warp() == 0 && words % 2 != 0 && puts_to(call, lane()))
    store(words_for(call, lane()) + words, uint64_t{0});
}

/// Tokens of word `word`, as bits, by the words of a put.
[[nodiscard]] DEEPEP_DEVICE uint32_t tokens_of_put(const FarDispatchCall&, const uint64_t* words, int word) {
  using namespace dev;
  return unpack_tagged(load(words + word)).value;
}

/// The messages of a call to a far rank, as its words say.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE int messages_for(const Call& call, int rank) {
  using namespace dev;
  const layout::LowLatencyWords& room = call.args.slots.words();
  const uint64_t* words = words_for(call, rank);
  int messages = 0;
  DEEPEP_ROLLED
  for (int word = room.kTokens; word < room.rows(); ++word)
    messages += popcount(tokens_of_put(call, words, word));
  return messages;
}

/// By the last block that has stored what it sends, behind a block barrier: to each far rank its words and
/// messages, in one put. Whole block.
template <class Call>
DEEPEP_DEVICE void put_messages(const Call& call) {
  using namespace dev;
  FarState* state = call.far.state;
  SharedArray<uint32_t> sent(call.far_shared().sent());
  if (thread() == 0) sent.set(0, static_cast<uint32_t>(count_sent(state, false)));
  sync_block();
  if (warp() != 0 || sent.get(0) == static_cast<uint32_t>(Sent::kSome)) return;
  if (puts_to(call, lane())) {
    const int64_t messages = call.args.refused ? 0 : messages_for(call, lane());
    put_stretch(call, FarPut::kMessages, lane(), call.far.slots.words(),
                call.far.slots.messages() + messages * call.message.bytes());
  }
  sync_warp();  // the wire is closed behind all puts
  if (lane() != 0) return;
  store(&state->dispatches, static_cast<uint64_t>(call.turn.number) + 1);
  close_wire(call.far.wire);
}

}  // namespace deepep::kernels
