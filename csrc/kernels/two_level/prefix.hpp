// How many tokens of the chunks before each chunk go to each rank: a kernel before a two-level dispatch that is
// not cached. One block; crosses no ranks.
//
// Phases:
//   count_chunks    a thread counts a chunk's tokens for one rank
//   sum_chunks      a warp adds up one rank's counts, chunk by chunk
#pragma once

#include "device/device.hpp"
#include "kernels/two_level/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE int64_t num_token_chunks(int64_t num_tokens) {
  return layout::ceil_div(num_tokens, layout::kChunkRecords);
}

DEEPEP_DEVICE void count_chunks(const TwoLevelPrefixArgs& args) {
  using namespace dev;
  const int ranks = args.num_ranks;
  for (int64_t i = thread(); i < num_token_chunks(args.num_tokens) * ranks; i += num_threads()) {
    const int64_t begin = i / ranks * layout::kChunkRecords;
    int count = 0;
#pragma unroll
    for (int t = 0; t < layout::kChunkRecords; ++t)
      if (begin + t < args.num_tokens)
        count += load_once(args.is_token_in_rank + (begin + t) * ranks + i % ranks) != 0;
    store(args.before + i, count);
  }
}

DEEPEP_DEVICE void sum_chunks(const TwoLevelPrefixArgs& args) {
  using namespace dev;
  const int ranks = args.num_ranks;
  const int64_t chunks = num_token_chunks(args.num_tokens);
  for (int r = warp(); r < ranks; r += num_warps()) {
    int sum = 0;
#pragma unroll 1
    for (int64_t first = 0; first < chunks; first += kWarpSize) {
      const bool is_one = first + lane() < chunks;
      int32_t* at = args.before + (first + lane()) * ranks + r;
      const int count = is_one ? load(at) : 0;
      const int earlier = sum + warp_exclusive_sum(count);
      if (is_one) store(at, earlier);
      sum += warp_sum(count);
    }
  }
}

DEEPEP_KERNEL(two_level_prefix_kernel, TwoLevelPrefixArgs, kThreads) {
  using namespace dev;
  count_chunks(args);
  sync_block();
  sum_chunks(args);
}

}  // namespace deepep::kernels
