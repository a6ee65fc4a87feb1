// How many rows and messages a rank sends: the phases of a dispatch that find out and post it.
#pragma once

#include "kernels/low_latency/dispatch_call.hpp"

namespace deepep::kernels {

inline constexpr int kCountUnroll = 2;  // entries that a lane has asked for at once

/// What a block counts: the tokens before its own, or in block 0 all.
[[nodiscard]] DEEPEP_DEVICE int counted_tokens(const LowLatencyDispatchArgs& args) {
  if (dev::block() == 0) return args.refused ? 0 : args.num_tokens;
  return tokens_of_block(args).begin;
}

/// Entries of whole tokens, a lane's each.
struct Entries {
  int64_t entry[kCountUnroll];
};

/// Those of the tokens from `first` on, as the warps of a block have them; -1 beyond `end`.
[[nodiscard]] DEEPEP_DEVICE Entries load_entries(const LowLatencyDispatchArgs& args, int first, int end) {
  using namespace dev;
  const int tokens = args.share.by_topk.quotient(kWarpSize);  // of a warp
  const int token = args.share.by_topk.quotient(lane());
  Entries entries;
#pragma unroll
  for (int u = 0; u < kCountUnroll; ++u) {
    const int begin = first + (u * num_warps() + warp()) * tokens;
    const bool has_entry = token < tokens && begin + token < end;
    entries.entry[u] = has_entry ? load_entry(args, begin * args.num_topk + lane()) : -1;
  }
  return entries;
}

/// What is counted first: asked for before anything else.
[[nodiscard]] DEEPEP_DEVICE Entries first_entries(const LowLatencyDispatchArgs& args) {
  return load_entries(args, 0, counted_tokens(args));
}

/// Adds entries to the counts of experts; an expert that a token chose twice is counted once. Block 0 notes for
/// each rank the tokens that go there, too. One warp, which has entries of tokens from `first` on.
DEEPEP_DEVICE void count_entries(const LowLatencyDispatchCall& call, const Entries& entries, int first) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<uint32_t> tokens(shared.tokens());
  const int token = args.share.by_topk.quotient(lane());
  const int tokens_of_warp = args.share.by_topk.quotient(kWarpSize);
  const int entry = lane() - token * args.num_topk;
  int expert[kCountUnroll];
  bool is_again[kCountUnroll] = {};
#pragma unroll
  for (int u = 0; u < kCountUnroll; ++u) expert[u] = expert_of(args, entries.entry[u]);
#pragma unroll 1
  for (int back = 1; back < args.num_topk; ++back) {
    const int from = (lane() - back) & (kWarpSize - 1);
#pragma unroll
    for (int u = 0; u < kCountUnroll; ++u) {
      const int earlier = shuffle(expert[u], from);
      is_again[u] = is_again[u] || (back <= entry && earlier == expert[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kCountUnroll; ++u) {
    if (expert[u] < 0 || is_again[u]) continue;
    rows.add(expert[u], 1);
    if (block() != 0) continue;
    const int t = first + (u * num_warps() + warp()) * tokens_of_warp + token;
    const int rank = args.share.by_local_experts.quotient(expert[u]);
    tokens.bit_or(rank * shared.token_words + t / 32, 1u << (t % 32));
  }
}

/// Rows of each expert, into shared memory. All threads, with barriers on both sides.
DEEPEP_DEVICE void count_rows(const LowLatencyDispatchCall& call, Entries entries) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const LowLatencyDispatchShared shared = call.shared();
  enter(call.lines, Step::kCount);
  const int end = counted_tokens(args);
  const int step = kCountUnroll * num_warps() * args.share.by_topk.quotient(kWarpSize);
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<uint32_t> tokens(shared.tokens());
  for (int i = thread(); i < args.num_local_experts * shared.num_ranks; i += num_threads()) rows.set(i, 0);
  if (block() == 0)
    for (int i = thread(); i < shared.num_ranks * shared.token_words; i += num_threads()) tokens.set(i, 0);
  sync_block();
#pragma unroll 1
  for (int first = 0; first < end; first += step) {
    count_entries(call, entries, first);
    if (first + step < end) entries = load_entries(args, first + step, end);
  }
  sync_block();
}

/// Where this rank's words for a rank are written, in whose slots their place is `offset`.
[[nodiscard]] DEEPEP_DEVICE uint64_t* words_to(const LowLatencyDispatchCall& call, int rank, int64_t offset) {
  return at<uint64_t>(call.g, rank, offset);
}

/// By block 0, which has counted all tokens. Tagged words: one hop, no flag. The places were read by kernels
/// that have ended (docs/low_latency.md), so there is nothing to release, but to this rank's own blocks: one
/// that fails takes the handle's epoch back.
template <class Call>
DEEPEP_DEVICE void post_words(const Call& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  if (block() != 0) return;
  enter(call.lines, Step::kPost);
  using Words = layout::LowLatencyWords;
  const Words& room = args.slots.words();
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<uint32_t> tokens(shared.tokens());
  const int num_local = args.num_local_experts;
  if (thread() == 0 && !args.refused) store<relaxed, gpu_scope>(args.handle.identity, call.epoch);
  DEEPEP_ROLLED
  for (int peer = 0; peer < g.num_ranks; ++peer) {
    if (!is_live(call, peer)) continue;
    uint64_t* words = words_to(call, peer, args.slots.words(call.epoch, g.rank));
    for (int word = thread(); word < room.count(); word += num_threads()) {
      uint32_t value = 0;
      if (word == Words::kDigest)
        value = args.share.digest;
      else if (word < room.rows())
        value = tokens.get(peer * shared.token_words + word - Words::kTokens);
      else if (word < room.rows() + num_local)
        value = static_cast<uint32_t>(rows.get(peer * num_local + word - room.rows()));
      const uint64_t tagged = pack_tagged(value, call.epoch);
      if (word == Words::kDigest && peer == g.rank)
        store<release, gpu_scope>(words + word, tagged);
      else
        store<relaxed, sys_scope>(words + word, tagged);
    }
  }
}

/// By block 0: what a combine has to come with.
DEEPEP_DEVICE void keep_hash(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  if (block() != 0 || args.refused) return;
  hash_topk(args, args.weights_travel, call.shared().hash());
  sync_block();
  if (thread() == 0) store(args.handle.identity + 1, SharedArray<uint32_t>(call.shared().hash()).get(0));
}

}  // namespace deepep::kernels
