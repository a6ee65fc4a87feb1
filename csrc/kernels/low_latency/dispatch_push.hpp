// Tokens to the ranks of their experts, once each: the phases of a dispatch that send.
#pragma once

#include "kernels/low_latency/cast.hpp"
#include "kernels/low_latency/dispatch_call.hpp"

namespace deepep::kernels {

/// Of the tokens before the block's, or in block 0 of all, into shared memory; an expert, or a rank, that a
/// token chose twice is counted once. All threads, with barriers on both sides.
DEEPEP_DEVICE void count_rows(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const int end = args.refused ? 0 : block() == 0 ? args.num_tokens : call.begin;
  const int num_local = args.num_local_experts;
  const int num_experts = num_local * args.group.num_ranks;
  SharedArray<int32_t> counts(call.shared().counts());
  for (int i = thread(); i < num_experts + args.group.num_ranks; i += num_threads()) counts.set(i, 0);
  sync_block();
  for (int i = thread(); i < end * args.num_topk; i += num_threads()) {
    const int expert = expert_at(args, i);
    if (expert < 0) continue;
    const int rank = expert / num_local;
    bool is_first_of_expert = true, is_first_of_rank = true;
#pragma unroll 1
    for (int j = i - i % args.num_topk; j < i; ++j) {
      const int earlier = expert_at(args, j);
      is_first_of_expert = is_first_of_expert && earlier != expert;
      is_first_of_rank = is_first_of_rank && (earlier < rank * num_local || earlier >= (rank + 1) * num_local);
    }
    if (is_first_of_expert) counts.add(expert, 1);
    if (is_first_of_rank) counts.add(num_experts + rank, 1);
  }
  sync_block();
}

/// By block 0, which has counted all tokens. Tagged words: one hop, no flag. The places were read by kernels
/// that have ended (docs/low_latency.md), so there is nothing to release.
DEEPEP_DEVICE void post_words(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  if (block() != 0) return;
  using Words = layout::LowLatencyWords;
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> hash(shared.hash());
  const uint32_t digest = digest_of(args);
  const int num_words = args.slots.num_words();
  for (int i = thread(); i < num_words * g.num_ranks; i += num_threads()) {
    const int peer = i / num_words;
    const int word = i - peer * num_words;
    if (!is_live(g, peer)) continue;
    uint32_t value = 0;
    if (word == Words::kDigest)
      value = digest;
    else if (word == Words::kMessages)
      value = static_cast<uint32_t>(counts.get(args.num_local_experts * g.num_ranks + peer));
    else if (word < Words::kRows + args.num_local_experts)
      value = static_cast<uint32_t>(counts.get(peer * args.num_local_experts + word - Words::kRows));
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, args.slots.words(call.epoch, g.rank)) + word,
                              pack_tagged(value, call.epoch));
  }
  if (args.refused) return;
  const uint32_t part = hash_topk(args, args.weights_travel);
  hash.add(0, part);
  sync_block();
  if (thread() != 0) return;
  store<relaxed, gpu_scope>(args.handle.identity, call.epoch);
  store(args.handle.identity + 1, hash.get(0));
}

/// Of one token, by lanes: lane k has its k-th entry, lane r what concerns rank r.
struct TokenPlace {
  int expert;    // of entry k, or -1
  int row;       // its number among the rows that this rank sends that expert
  int position;  // of the message among those for rank r, or -1
};

/// Where one of the block's tokens goes. One warp.
[[nodiscard]] DEEPEP_DEVICE TokenPlace place_token(const LowLatencyDispatchCall& call, int t) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  const int num_local = args.num_local_experts;
  const bool is_first_block = block() == 0;  // its counts are of all tokens, and none comes before its own
  SharedArray<int32_t> counts(call.shared().counts());
  const int first = lane() * num_local, end = first + num_local;  // experts of rank r
  TokenPlace place{-1, 0, -1};
  if (lane() < args.num_topk) place.expert = expert_at(args, t * args.num_topk + lane());
  bool goes = false;
#pragma unroll 1
  for (int j = 0; j < args.num_topk; ++j) {
    const int expert = expert_at(args, t * args.num_topk + j);
    goes = goes || (expert >= first && expert < end);
  }
  const bool is_rank = lane() < g.num_ranks;
  int position = is_rank && !is_first_block ? counts.get(num_local * g.num_ranks + lane()) : 0;
  place.row = place.expert >= 0 && !is_first_block ? counts.get(place.expert) : 0;
#pragma unroll 1
  for (int before = call.begin; before < t; ++before) {
    bool has = false, went = false;
#pragma unroll 1
    for (int j = 0; j < args.num_topk; ++j) {
      const int expert = expert_at(args, before * args.num_topk + j);
      has = has || expert == place.expert;
      went = went || (expert >= first && expert < end);
    }
    place.row += has ? 1 : 0;
    position += went ? 1 : 0;
  }
  if (goes && is_rank && is_live(g, lane())) place.position = position;
  return place;
}

/// The headers of a token's messages. One warp.
DEEPEP_DEVICE void write_headers(const LowLatencyDispatchCall& call, const Destinations& to,
                                 const TokenPlace& place, int t) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const layout::LowLatencyMessage& message = call.message;
  const int num_local = args.num_local_experts;
  const int owner = place.expert >= 0 ? place.expert / num_local : -1;
  uint32_t weight = 0;
  if (args.weights_travel && lane() < args.num_topk)
    weight = load_once(args.topk_weights + t * args.num_topk + lane());
#pragma unroll 1
  for (uint32_t ranks = to.ranks; ranks != 0; ranks &= ranks - 1) {
    const int rank = lowest_bit(ranks);
    std::byte* there = reinterpret_cast<std::byte*>(shuffle(to.message, rank));
    if (lane() == 0) store(reinterpret_cast<uint32_t*>(there), static_cast<uint32_t>(t));
    if (lane() >= args.num_topk) continue;
    const uint32_t entry =
        owner == rank ? layout::pack_entry(place.expert - rank * num_local, place.row) : layout::kNoEntry;
    store(reinterpret_cast<uint32_t*>(there + message.entry(lane())), entry);
    store(reinterpret_cast<uint32_t*>(there + message.weight(lane())), weight);
  }
}

/// The block's tokens.
DEEPEP_DEVICE void push_messages(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  const WarpRows mine = rows_of_warp(call.end - call.begin);
#pragma unroll 1
  for (int t = call.begin + mine.first; t < call.end; t += mine.step) {
    const TokenPlace place = place_token(call, t);
    Destinations to{ballot(place.position >= 0), 0};
    if (place.position >= 0)
      to.message = reinterpret_cast<uint64_t>(at<std::byte>(
          g, lane(), args.slots.messages(call.epoch, g.rank) + place.position * call.message.bytes()));
    if (mine.part == 0) {
      write_headers(call, to, place, t);
      if (lane() < g.num_ranks) store(args.handle.send_position + t * g.num_ranks + lane(), place.position);
    }
    if (args.casts)
      cast_channels(args, call.message, to, t, mine.part, mine.parts);
    else
      copy_channels(args, call.message, to, t, mine.part, mine.parts);
  }
}

/// The flags of the block's messages, a thread each: the block barrier orders the rows of all warps before
/// them.
DEEPEP_DEVICE void signal_messages(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const Group& g = call.g;
  sync_block();
#pragma unroll 1
  for (int i = call.begin * g.num_ranks + thread(); i < call.end * g.num_ranks; i += num_threads()) {
    const int position = load(call.args.handle.send_position + i);
    if (position < 0) continue;
    uint32_t* flags = at<uint32_t>(g, i % g.num_ranks, call.args.slots.message_flags(call.epoch, g.rank));
    store<release, sys_scope>(flags + position, call.epoch);
  }
}

}  // namespace deepep::kernels
