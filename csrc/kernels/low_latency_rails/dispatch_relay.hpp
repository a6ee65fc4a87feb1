// What came along rails, spread to the ranks of this domain: the phase of a dispatch in which a rank is
// gateway.
#pragma once

#include "kernels/low_latency_rails/dispatch_call.hpp"

namespace deepep::kernels {

/// Waits for the put of each rank along a rail: the ranks whose put came, as bits. One that does not come is a
/// fault. All threads, with barriers.
[[nodiscard]] DEEPEP_DEVICE uint32_t wait_records(const RailDispatchCall& call) {
  using namespace dev;
  SharedArray<uint32_t> came(call.far_shared().sent());
  sync_block();  // the word was put_messages'
  if (warp() == 0) {
    const bool is_mine = puts_to(call, lane());
    const bool has_come = is_mine && wait_put(call, FarPut::kMessages, lane(), Phase::kCounts);
    const uint32_t ranks = ballot(has_come);
    if (is_mine && !has_come)
      SharedArray<uint32_t>(call.shared().failed()).bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    if (lane() == 0) came.set(0, ranks);
  }
  sync_block();
  return came.get(0);
}

/// Words that a rank along a rail has put, for each rank of this domain.
[[nodiscard]] DEEPEP_DEVICE const uint64_t* words_from(const RailDispatchCall& call, int source) {
  return arrived_at<uint64_t>(call.far, call.turn, source, call.far.slots.words());
}

/// By block 0: they are tagged, as their source would store them.
DEEPEP_DEVICE void relay_words(const RailDispatchCall& call, int source) {
  using namespace dev;
  const int count = call.args.slots.words().count();
  const uint64_t* words = words_from(call, source);
#pragma unroll 1
  for (int rank = 0; rank < call.domain.num_ranks; ++rank) {
    auto* there = at<uint64_t>(call.g, call.domain.first + rank, call.args.slots.words(call.epoch, source));
    for (int word = thread(); word < count; word += num_threads())
      store<relaxed, sys_scope>(there + word, load(words + rank * count + word));
  }
}

/// A record to each rank that its token goes to, then their flags; and into the handle which ranks those are.
/// One warp.
DEEPEP_DEVICE void relay_record(const RailDispatchCall& call, const std::byte* record, int source, int token,
                                uint32_t* relayed) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const layout::LowLatencyMessage& at_message = call.message;
  uint32_t entry = layout::kNoEntry, weight = 0;
  if (lane() < args.num_topk) {
    entry = load(reinterpret_cast<const uint32_t*>(record + at_message.entry(lane())));
    weight = load(reinterpret_cast<const uint32_t*>(record + at_message.weight(lane())));
  }
  int rank = -1;
  if (entry != layout::kNoEntry) {
    rank = args.share.by_local_experts.quotient(layout::entry_expert(entry));
    entry -= layout::pack_entry(rank * args.num_local_experts, 0);
  }
  const uint32_t ranks = warp_or(rank >= 0 ? 1u << rank : 0u);
  const int64_t offset = args.slots.messages(call.epoch, source) + token * at_message.bytes();
  const int pieces = static_cast<int>((at_message.bytes() - at_message.row()) / 16);
#pragma unroll 1
  for (uint32_t to = ranks; to != 0; to &= to - 1) {
    const int there = lowest_bit(to);
    auto* message = at<std::byte>(call.g, call.domain.first + there, offset);
    if (lane() < args.num_topk) {
      store(reinterpret_cast<uint32_t*>(message + at_message.entry(lane())),
            rank == there ? entry : layout::kNoEntry);
      store(reinterpret_cast<uint32_t*>(message + at_message.weight(lane())), weight);
    }
    const Vec16* from = reinterpret_cast<const Vec16*>(record + at_message.row());
    Vec16* row = reinterpret_cast<Vec16*>(message + at_message.row());
#pragma unroll 1
    for (int piece = lane(); piece < pieces; piece += kWarpSize)
      store_streaming(row + piece, load_streaming(from + piece));
  }
  sync_warp();  // the warp's stores come before the lanes' flags
  if (((ranks >> lane()) & 1u) != 0) {
    const int64_t flags_at = args.slots.message_flags(call.epoch, source);
    auto* flags = at<uint32_t>(call.g, call.domain.first + lane(), flags_at);
    store<release, sys_scope>(flags + token, call.epoch);
  }
  if (lane() == 0) store(relayed, ranks);
}

/// The records of a rank along a rail, of a call that is made alike; the warps of all blocks have them in turn.
DEEPEP_DEVICE void relay_records(const RailDispatchCall& call, int source, WarpTurns& turns) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const uint64_t* words = words_from(call, source);
  using Words = layout::LowLatencyWords;
  const uint32_t digest = unpack_tagged(load(words + Words::kDigest)).value;
  if (args.refused || digest != args.share.digest) return;
  uint32_t* relayed = relayed_of(args) + int64_t{domain_of(call.domain, source)} * args.max_tokens;
  int place = 0;
#pragma unroll 1
  for (int first = 0; first < args.max_tokens; first += 32) {
    const uint32_t tokens = tokens_of_put(call, words, Words::kTokens + first / 32);
#pragma unroll 1
    for (int t = first; t < layout::min_of(first + 32, args.max_tokens); ++t) {
      const bool goes = ((tokens >> (t - first)) & 1u) != 0;
      if (turns.is_mine()) {
        const auto* record = arrived_at<std::byte>(
            call.far, call.turn, source, call.far.slots.messages() + place * call.message.bytes());
        if (goes)
          relay_record(call, record, source, t, relayed + t);
        else if (lane() == 0)
          store(relayed + t, 0u);
      }
      place += goes ? 1 : 0;
    }
  }
}

/// All that came along rails.
DEEPEP_DEVICE void relay_messages(const RailDispatchCall& call) {
  using namespace dev;
  WarpTurns turns = WarpTurns::begin();
#pragma unroll 1
  for (uint32_t rails = wait_records(call); rails != 0; rails &= rails - 1) {
    const int source = lowest_bit(rails);
    if (block() == 0) relay_words(call, source);
    relay_records(call, source, turns);
  }
}

}  // namespace deepep::kernels
