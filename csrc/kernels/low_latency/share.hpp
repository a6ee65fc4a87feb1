// How a low-latency launch shares out its work, worked out by the host: a kernel of a few microseconds has no
// time for divisions.
#pragma once

#include "kernels/common/group.hpp"
#include "kernels/low_latency/args.hpp"

namespace deepep::kernels {

/// In place of a digest, the word of a rank whose call is made by other means; digests are odd.
inline constexpr uint32_t kElsewhere = 2;

/// Chunks, of a warp's width, that a strip of a row that came has at least; and 2^s strips at most.
inline constexpr int kStripChunks = 3;
inline constexpr int kMaxSpreadShift = 2;

/// What a rank posts that takes no part in a call.
template <class Args>
[[nodiscard]] DEEPEP_HD uint32_t absence_of(const Args& args) {
  return args.elsewhere ? kElsewhere : kRefusal;
}

/// The sizes that ranks must pass alike to either operation.
template <class Args>
[[nodiscard]] Digest digest_of_sizes(const Args& args) {
  Digest digest;
  digest.add(static_cast<uint32_t>(args.max_tokens));
  digest.add(static_cast<uint32_t>(args.hidden));
  digest.add(static_cast<uint32_t>(args.num_local_experts));
  digest.add(static_cast<uint32_t>(args.num_topk));
  return digest;
}

/// What ranks must pass alike, in one word; of a rank that takes no part, that.
[[nodiscard]] inline uint32_t digest_of(const LowLatencyDispatchArgs& args) {
  if (args.refused) return absence_of(args);
  Digest digest = digest_of_sizes(args);
  digest.add((args.casts ? 1u : 0u) | (args.rounds_scales ? 2u : 0u) | (args.packs_scales ? 4u : 0u));
  digest.add(args.weights_travel ? 1u : 0u);
  return digest.value | 1u;
}

/// The same.
[[nodiscard]] inline uint32_t digest_of(const LowLatencyCombineArgs& args) {
  if (args.refused) return absence_of(args);
  Digest digest = digest_of_sizes(args);
  digest.add((args.weights_travelled ? 1u : 0u) | static_cast<uint32_t>(args.returned) << 1);
  return digest.value | 1u;
}

/// True where each entry of a token has a row that goes back.
[[nodiscard]] DEEPEP_HD bool returns_entries(const LowLatencyCombineArgs& args) {
  return args.returned == Returned::kEntries || args.returned == Returned::kEntriesInLogfmt;
}

/// The largest s with 2^s warps for each of so many items, one at least.
[[nodiscard]] inline int warp_shift(int64_t items, int num_warps) {
  int shift = 0;
  while ((layout::max_of(items, int64_t{1}) << (shift + 1)) <= num_warps) ++shift;
  return shift;
}

/// Sources whose messages are dealt to blocks: those of others in a dispatch, where a block keeps its own
/// tokens; and in a combine that returns entries as they are, where those of this rank are read where they lie.
[[nodiscard]] inline int num_sources(const LowLatencyDispatchArgs& args) { return args.group.num_ranks - 1; }
[[nodiscard]] inline int num_sources(const LowLatencyCombineArgs& args) {
  return args.group.num_ranks - (args.returned == Returned::kEntries ? 1 : 0);
}

/// Warps for the messages that come: in a dispatch half of them, the others have this rank's own.
[[nodiscard]] inline int warps_for_messages(const LowLatencyDispatchArgs&, int num_warps) {
  return layout::max_of(num_warps / 2, 1);
}
[[nodiscard]] inline int warps_for_messages(const LowLatencyCombineArgs&, int num_warps) { return num_warps; }

/// A message has from one row to K: blocks that spread strips of many have alike.
[[nodiscard]] inline int strip_shift(const LowLatencyDispatchArgs& args) {
  const int chunks = args.hidden * (args.casts ? 1 : 2) / (16 * dev::kWarpSize);
  int shift = 0;
  while (shift < kMaxSpreadShift && chunks >> (shift + 1) >= kStripChunks) ++shift;
  return shift;
}
/// A row that goes back has one flag, and one block that sums it.
[[nodiscard]] inline int strip_shift(const LowLatencyCombineArgs&) { return 0; }

/// A combine takes at most so much of a block's shared memory for its own words, and 4 bytes for each 32 tokens
/// of each rank.
inline constexpr int kCombineWordBytes = 256;

/// A block as the launcher makes it. bulk_bytes: all of its shared memory, where bulk copies can fill that;
/// 0 where the GPU, or its code, has none.
struct BlockSize {
  int num_warps;
  int bulk_bytes;
};

/// What a warp has in shared memory of the rows of its first message, which it sums when their weights have
/// come.
inline void add_stage(LowLatencyShare&, const LowLatencyDispatchArgs&, int) {}
inline void add_stage(LowLatencyShare& share, const LowLatencyCombineArgs& args, int bulk_bytes) {
  if (args.returned != Returned::kSums) return;
  const int parts = 1 << share.message_shift;
  const int words = args.group.num_ranks * ((args.max_tokens + 31) / 32);
  const int room = layout::max_of(bulk_bytes - kCombineWordBytes - 4 * words, 0);
  share.staged_bytes = static_cast<int>(16 * layout::ceil_div(args.hidden / 8, parts));
  share.staged_rows = layout::min_of(args.num_topk, room / (share.num_warps * share.staged_bytes));
}

template <class Args>
[[nodiscard]] LowLatencyShare share_of(const Args& args, int num_blocks, const BlockSize& block) {
  const int num_warps = block.num_warps;
  const auto of_block = [&](int64_t items, int blocks) { return layout::ceil_div(items, blocks); };
  const auto can_spare_one = [&](int64_t items) {
    return num_blocks > 1 && of_block(items, num_blocks - 1) == of_block(items, num_blocks);
  };
  LowLatencyShare share{};
  share.digest = digest_of(args);
  share.num_sources = num_sources(args);
  share.tokens_per_block = static_cast<int>(of_block(args.num_tokens, num_blocks));
  share.first_sender = can_spare_one(args.num_tokens) ? 1 : 0;
  share.token_shift = warp_shift(share.tokens_per_block, num_warps);
  // Others have about as many tokens as this rank: a guess, which decides who does what, and not what is done.
  share.strip_shift = strip_shift(args);
  const int64_t messages = (int64_t{share.num_sources} * args.num_tokens) << share.strip_shift;
  share.first_worker = can_spare_one(messages) ? 1 : 0;
  const int warps = warps_for_messages(args, num_warps);
  share.message_shift = warp_shift(of_block(messages, num_blocks), warps);
  share.own_shift = warp_shift(share.tokens_per_block, warps);
  share.num_warps = num_warps;
  add_stage(share, args, block.bulk_bytes);
  while ((1 << share.rank_shift) < args.group.num_ranks) ++share.rank_shift;
  share.by_local_experts = layout::Divisor(args.num_local_experts);
  share.by_topk = layout::Divisor(args.num_topk);
  share.by_tokens = layout::Divisor(layout::max_of(args.num_tokens, 1));
  share.by_rest = layout::Divisor(layout::max_of(args.max_tokens - args.num_tokens, 1));
  share.by_words = layout::Divisor(args.slots.words().count());
  return share;
}

}  // namespace deepep::kernels
