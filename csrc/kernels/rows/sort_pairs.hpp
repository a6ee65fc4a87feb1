// Pairs of received rows and local experts, sorted by expert, then row, then k; a block an expert.
//
// Phases:
//   count_entries  each warp counts the entries of its part that name this expert, and those of lower ones
//   place_entries  behind the lower experts' and the parts' before: pairs and slots; the expert's end
//   fill_rest      the last expert's block: pairs past the last, where more were counted beforehand
//
// No block waits for another: each counts all entries for itself, which lie in L2.
#pragma once

#include "device/device.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::kernels {

inline constexpr int kSortThreads = 1024;
inline constexpr int kSortUnroll = 8;  // entries that a lane has in flight

/// Where this warp's entries are: whole warps of them, but for the last.
struct EntryPart {
  int64_t begin;
  int64_t end;
};

[[nodiscard]] DEEPEP_DEVICE EntryPart part_of_warp(const SortPairsArgs& args) {
  const int64_t step = static_cast<int64_t>(dev::kWarpSize) * dev::num_warps();
  const int64_t length = (args.num_entries + step - 1) / step * dev::kWarpSize;
  const int64_t begin = length * dev::warp();
  const int64_t end = begin + length;
  return {begin < args.num_entries ? begin : args.num_entries, end < args.num_entries ? end : args.num_entries};
}

/// kSortUnroll entries of this lane, a warp apart; -1 behind the end.
template <class Index>
DEEPEP_DEVICE void read_entries(const Index* topk_idx, int64_t first, int64_t end, int num_local_experts,
                                int32_t (&entries)[kSortUnroll]) {
#pragma unroll
  for (int u = 0; u < kSortUnroll; ++u) {
    const int64_t i = first + u * dev::kWarpSize + dev::lane();
    const Index entry = i < end ? dev::load_once(topk_idx + i) : Index{-1};
    entries[u] = entry >= 0 && entry < num_local_experts ? static_cast<int32_t>(entry) : -1;
  }
}

/// What a warp has counted: [warps] of this expert, then [warps] of lower ones.
[[nodiscard]] DEEPEP_DEVICE dev::SharedArray<int32_t> entry_counts() { return dev::SharedArray<int32_t>(0); }

template <class Index>
DEEPEP_DEVICE void count_part(const SortPairsArgs& args, const Index* topk_idx, int expert) {
  using namespace dev;
  const EntryPart part = part_of_warp(args);
  int32_t own = 0, lower = 0;
  for (int64_t first = part.begin; first < part.end; first += kSortUnroll * kWarpSize) {
    int32_t entries[kSortUnroll];
    read_entries(topk_idx, first, part.end, args.num_local_experts, entries);
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      own += entries[u] == expert ? 1 : 0;
      lower += entries[u] >= 0 && entries[u] < expert ? 1 : 0;
    }
  }
  own = warp_sum(own);
  lower = warp_sum(lower);
  if (lane() != 0) return;
  dev::SharedArray<int32_t> counts = entry_counts();
  counts.set(warp(), own);
  counts.set(num_warps() + warp(), lower);
}

DEEPEP_DEVICE void count_entries(const SortPairsArgs& args) {
  if (args.index_bytes == 8)
    count_part(args, static_cast<const int64_t*>(args.topk_idx), dev::block());
  else
    count_part(args, static_cast<const int32_t*>(args.topk_idx), dev::block());
}

template <class Index>
DEEPEP_DEVICE void place_part(const SortPairsArgs& args, const Index* topk_idx, int expert) {
  using namespace dev;
  const EntryPart part = part_of_warp(args);
  int64_t slot = 0;
  for (int w = 0; w < num_warps(); ++w)
    slot += entry_counts().get(num_warps() + w) + (w < warp() ? entry_counts().get(w) : 0);
  if (warp() == num_warps() - 1 && lane() == 0)
    store(args.ends + expert,
          static_cast<int32_t>(layout::min_of(slot + entry_counts().get(warp()), args.num_pairs)));
  for (int64_t first = part.begin; first < part.end; first += kSortUnroll * kWarpSize) {
    int32_t entries[kSortUnroll];
    read_entries(topk_idx, first, part.end, args.num_local_experts, entries);
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const int64_t i = first + u * kWarpSize + lane();
      const uint32_t own = ballot(entries[u] == expert);
      const int64_t at = slot + popcount(own & ((1u << lane()) - 1u));
      slot += popcount(own);
      if (entries[u] == expert) {
        const bool has_room = at < args.num_pairs;
        if (has_room) store(args.pairs + at, i);
        store(args.slots + i, has_room ? at : int64_t{-1});
      }
      if (expert == 0 && entries[u] < 0 && i < part.end) store(args.slots + i, int64_t{-1});
    }
  }
}

DEEPEP_DEVICE void place_entries(const SortPairsArgs& args) {
  if (args.index_bytes == 8)
    place_part(args, static_cast<const int64_t*>(args.topk_idx), dev::block());
  else
    place_part(args, static_cast<const int32_t*>(args.topk_idx), dev::block());
}

DEEPEP_DEVICE void fill_rest(const SortPairsArgs& args) {
  using namespace dev;
  if (block() != args.num_local_experts - 1) return;
  int64_t total = 0;
  for (int w = 0; w < 2 * num_warps(); ++w) total += entry_counts().get(w);
  for (int64_t i = total + thread(); i < args.num_pairs; i += num_threads()) store(args.pairs + i, int64_t{0});
}

DEEPEP_KERNEL(sort_pairs_kernel, SortPairsArgs, kSortThreads) {
  using namespace dev;
  count_entries(args);
  sync_block();
  place_entries(args);
  fill_rest(args);
}

}  // namespace deepep::kernels
