// Where a rank's tokens go, by their top-k indices: so many of each stretch of them to each rank, in the shared
// memory of every block that needs to know.
//
// A stretch is counted by a warp, a token a lane. Where there are few, each block counts them all for itself:
// the indices lie in L2, and no word between blocks is faster. Else blocks claim them in groups, as they come,
// and post them in tagged words, which carry nothing but themselves. So no block waits for one that has
// not started: what is not claimed by those that run is claimed by whoever looks.
#pragma once

#include "kernels/dispatch/call.hpp"
#include "layout/placement.hpp"

namespace deepep::kernels {

inline constexpr int kEntriesAtOnce = 8;  // that a lane has in flight

/// A block's dynamic shared memory in mode kTopk: metadata, and what is counted.
struct CountingShared {
  int num_ranks;

  /// The group that the block has claimed: int32 [2], in turn.
  [[nodiscard]] DEEPEP_HD int64_t claimed() const { return MetadataShared{num_ranks}.bytes(); }
  /// Whether the block has counted the last of the experts: uint32.
  [[nodiscard]] DEEPEP_HD int64_t is_last() const { return claimed() + 8; }
  /// Tokens for each rank: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t totals() const { return claimed() + 16; }
  /// The same of each stretch: int32 [stretches, R].
  [[nodiscard]] DEEPEP_HD int64_t stretches() const { return totals() + 4 * static_cast<int64_t>(num_ranks); }
  [[nodiscard]] DEEPEP_HD int64_t bytes(int num_stretches) const {
    return stretches() + 4 * static_cast<int64_t>(num_ranks) * num_stretches;
  }
};

/// The same in mode kExpanded: behind it what is numbered, and where experts' rows begin.
struct NumberingShared {
  int num_ranks;
  int warps;
  int num_experts;  // E
  int num_stretches;

  [[nodiscard]] DEEPEP_HD static NumberingShared of(const DispatchArgs& args, int warps) {
    return {.num_ranks = args.group.num_ranks,
            .warps = warps,
            .num_experts = args.num_local_experts * args.group.num_ranks,
            .num_stretches = args.groups.num_stretches};
  }
  /// Entries of the warp's stretch for each expert, then the place of the next one: int32 [warps, E].
  [[nodiscard]] DEEPEP_HD int64_t counters() const {
    return layout::align_up(CountingShared{num_ranks}.bytes(num_stretches), 16);
  }
  /// The row of each source's first entry of each local expert: int32 [R, L].
  [[nodiscard]] DEEPEP_HD int64_t bases() const { return counters() + int64_t{4} * warps * num_experts; }
  /// Entries of each local expert, and its first row: int32 [L] each.
  [[nodiscard]] DEEPEP_HD int64_t entries() const { return bases() + int64_t{4} * num_experts; }
  [[nodiscard]] DEEPEP_HD int64_t begins() const { return entries() + int64_t{4} * num_experts; }
  /// Rows in all, gaps included: int32. The sources whose rows did not come, as bits: uint32.
  [[nodiscard]] DEEPEP_HD int64_t num_rows() const { return begins() + int64_t{4} * num_experts; }
  [[nodiscard]] DEEPEP_HD int64_t gave_up() const { return num_rows() + 4; }
  /// Whether a push block spreads rows when it has pushed its own: uint32.
  [[nodiscard]] DEEPEP_HD int64_t joins() const { return num_rows() + 8; }
  /// The row after the last that each warp has written at each rank, see kFinished; the same as the warp that
  /// follows has seen it, and as it has posted it: uint32 [warps, R] each.
  [[nodiscard]] DEEPEP_HD int64_t progress() const { return num_rows() + 16; }
  [[nodiscard]] DEEPEP_HD int64_t followed() const { return progress() + int64_t{4} * warps * num_ranks; }
  [[nodiscard]] DEEPEP_HD int64_t posted() const { return followed() + int64_t{4} * warps * num_ranks; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return posted() + int64_t{4} * warps * num_ranks; }
};

/// Brings the top-k indices to L2, each line once for all blocks: every block needs the epoch before it asks
/// for them.
DEEPEP_DEVICE void prefetch_indices(const DispatchArgs& args) {
  using namespace dev;
  const auto* indices = static_cast<const std::byte*>(args.topk_idx);
  const int64_t bytes = args.num_tokens * args.num_topk * args.index_bytes;
  const int64_t step = layout::kLine * num_threads() * num_blocks();
  for (int64_t i = layout::kLine * (block() * num_threads() + thread()); i < bytes; i += step)
    prefetch(indices + i);
}

/// Bit r: one of the entries is an expert of rank r.
template <class Index>
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of_entries(const DispatchArgs& args, const Index* entries) {
  const int64_t num_experts = int64_t{args.num_local_experts} * args.group.num_ranks;
  uint32_t ranks = 0;
#pragma unroll 1
  for (int first = 0; first < args.num_topk; first += kEntriesAtOnce) {
    Index entry[kEntriesAtOnce];
#pragma unroll
    for (int i = 0; i < kEntriesAtOnce; ++i)
      entry[i] = first + i < args.num_topk ? dev::load_once(entries + first + i) : Index{-1};
#pragma unroll
    for (int i = 0; i < kEntriesAtOnce; ++i)
      if (entry[i] >= 0 && entry[i] < num_experts)
        ranks |= 1u << args.experts_per_rank.quotient(static_cast<int>(entry[i]));
  }
  return ranks;
}

/// Bit r: token t goes to rank r.
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of_token(const DispatchArgs& args, int64_t t) {
  const int64_t at = t * args.num_topk;
  return args.index_bytes == 8 ? ranks_of_entries(args, static_cast<const int64_t*>(args.topk_idx) + at)
                               : ranks_of_entries(args, static_cast<const int32_t*>(args.topk_idx) + at);
}

/// Lane i: the ranks that token begin + i goes to, as bits; none from `size` on.
[[nodiscard]] DEEPEP_DEVICE uint32_t ranks_of_tokens(const DispatchArgs& args, int64_t begin, int size) {
  return dev::lane() < size ? ranks_of_token(args, begin + dev::lane()) : 0;
}

/// Of ranks as bits, of a token in each lane: lane r gets which lanes have rank r, as bits. One warp.
[[nodiscard]] DEEPEP_DEVICE uint32_t by_rank(int num_ranks, uint32_t ranks) {
  using namespace dev;
  uint32_t lanes = 0;
  for (int r = 0; r < num_ranks; ++r) {
    const uint32_t with = ballot((ranks >> r) & 1u);
    if (lane() == r) lanes = with;
  }
  return lanes;
}

/// Lane r: so many tokens of a stretch go to rank r. One warp.
[[nodiscard]] DEEPEP_DEVICE int count_stretch(const DispatchArgs& args, int stretch) {
  const int64_t begin = int64_t{stretch} * layout::kStretch;
  const int64_t left = args.num_tokens - begin;
  const int size = static_cast<int>(layout::min_of(left, int64_t{layout::kStretch}));
  return dev::popcount(by_rank(args.group.num_ranks, ranks_of_tokens(args, begin, size)));
}

[[nodiscard]] DEEPEP_DEVICE dev::SharedArray<int32_t> stretch_counts(int num_ranks) {
  return dev::SharedArray<int32_t>(CountingShared{num_ranks}.stretches());
}

/// So many tokens of the stretches before `end` go to rank r. One warp; all lanes get it.
[[nodiscard]] DEEPEP_DEVICE int stretch_sum(int num_ranks, int r, int end) {
  using namespace dev;
  int sum = 0;
  for (int s = lane(); s < end; s += kWarpSize) sum += stretch_counts(num_ranks).get(s * num_ranks + r);
  return warp_sum(sum);
}

/// The stretches that a block has to know: all of them where it posts the totals, else those before its last.
[[nodiscard]] DEEPEP_DEVICE int stretches_needed(const DispatchArgs& args, const DispatchRole& role) {
  return is_leader_block() ? args.groups.num_stretches : static_cast<int>(role.end / layout::kStretch);
}

/// Each warp some of the stretches, for this block alone.
DEEPEP_DEVICE void count_alone(const DispatchArgs& args, int needed) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  for (int s = warp(); s < needed; s += num_warps()) {
    const int count = count_stretch(args, s);
    if (lane() < ranks) stretch_counts(ranks).set(s * ranks + lane(), count);
  }
}

/// The words of all stretches: see layout::CountingLayout.
[[nodiscard]] DEEPEP_DEVICE uint64_t* stretch_words(const DispatchArgs& args) {
  return reinterpret_cast<uint64_t*>(args.counting + layout::CountingLayout{args.group.num_ranks}.stretches());
}

/// Calls `work(group)` for group after group of `num_groups` that the block claims from `claims`, all threads,
/// until none is left. Returns how many these were. The next claim is on its way meanwhile. Behind it all
/// threads have done their work.
template <class Work>
DEEPEP_DEVICE int work_on_claims(const DispatchArgs& args, uint32_t* claims, int num_groups,
                                 const Work& work) {
  using namespace dev;
  SharedArray<int32_t> claimed(CountingShared{args.group.num_ranks}.claimed());
  uint32_t next = thread() == 0 ? fetch_add<relaxed, gpu_scope>(claims, 1u) : 0;
  for (int turn = 0;; ++turn) {
    if (thread() == 0) claimed.set(turn % 2, static_cast<int32_t>(next));
    sync_block();
    const int group = claimed.get(turn % 2);
    if (group >= num_groups) return turn;
    if (thread() == 0) next = fetch_add<relaxed, gpu_scope>(claims, 1u);
    work(group);
  }
}

/// Counts groups of stretches for all blocks.
DEEPEP_DEVICE void count_for_all(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const int ranks = call.g.num_ranks;
  work_on_claims(args, &call.g.state->groups_claimed, args.groups.num_groups, [&](int group) {
    const int stretch = group * args.groups.stretches_a_group + warp();
    if (warp() >= args.groups.stretches_a_group || stretch >= args.groups.num_stretches) return;
    const int count = count_stretch(args, stretch);
    if (lane() < ranks)
      store<relaxed, gpu_scope>(stretch_words(args) + stretch * ranks + lane(),
                                pack_tagged(static_cast<uint32_t>(count), call.epoch));
  });
}

/// Waits for the counts of the stretches that this block needs. A thread a word.
DEEPEP_DEVICE void collect_counts(const DispatchCall& call, int needed) {
  using namespace dev;
  const Group& g = call.g;
  SharedArray<uint32_t> recv_failed(MetadataShared{g.num_ranks}.recv_failed());
  for (int i = thread(); i < needed * g.num_ranks; i += num_threads()) {
    uint32_t value = 0;
    if (!wait_tag<relaxed, gpu_scope>(stretch_words(call.args) + i, call.epoch, call.deadline, value)) {
      note_fault(g, Phase::kCounts, 1u << g.rank, call.epoch, value);
      recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    }
    stretch_counts(g.num_ranks).set(i, static_cast<int32_t>(value));
  }
}

/// Brings the warp's first row to the cache while the metadata travels.
DEEPEP_DEVICE void prefetch_row(const DispatchArgs& args, const WarpTokens& mine) {
  if (mine.begin >= mine.end) return;
  const int lines = static_cast<int>(args.row_bytes / layout::kLine);
  const int end = lines * (mine.part + 1) / mine.parts;
  for (int line = lines * mine.part / mine.parts + dev::lane(); line < end; line += dev::kWarpSize)
    dev::prefetch(args.x + mine.begin * args.row_bytes + line * layout::kLine);
}

/// So many tokens of each stretch go to each rank, for all the stretches that this block needs. Whole block.
DEEPEP_DEVICE void count_stretches(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  enter(call.lines, Step::kCount);
  const int needed = stretches_needed(call.args, share.role);
  prefetch_row(call.args, share.mine);
  if (call.args.groups.stretches_a_group == 0) {
    count_alone(call.args, needed);
  } else {
    count_for_all(call);
    collect_counts(call, needed);
  }
  sync_block();
}

/// The leader block: tokens for each rank. False if they are not known. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool sum_stretches(const DispatchCall& call) {
  using namespace dev;
  const int ranks = call.g.num_ranks;
  SharedArray<uint32_t> recv_failed(MetadataShared{ranks}.recv_failed());
  SharedArray<int32_t> totals(CountingShared{ranks}.totals());
  if (recv_failed.bit_or(0, 0u) != 0) return false;  // an atomic: who returns may go on and note more
  for (int r = warp(); r < ranks; r += num_warps()) {
    const int total = stretch_sum(ranks, r, call.args.groups.num_stretches);
    if (lane() == 0) totals.set(r, total);
  }
  sync_block();
  return true;
}

}  // namespace deepep::kernels
