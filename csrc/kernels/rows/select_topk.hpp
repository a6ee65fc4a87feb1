// The K largest of each token's E scores, largest first; equal ones by index. A warp a token.
//
// Phases:
//   select_topk  K times the largest that is smaller than the last
//
// A score and its index make one word, which orders as the two together: no two are equal. NaN is above all
// numbers, and -0 equals 0, as in a stable sort.
#pragma once

#include "device/device.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::kernels {

/// The lower half of a word: the lower the index, the larger; below all ones, which no word is.
inline constexpr uint32_t kIndexBase = 0x7fffffffu;

/// Orders as (score, then lower index); above 0.
[[nodiscard]] DEEPEP_DEVICE uint64_t ordered_word(float score, int index) {
  const uint32_t bits = dev::bits_of(score == 0.0f ? 0.0f : score);
  const uint32_t key = score != score ? 0xffffffffu : bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(key) << 32 | (kIndexBase - static_cast<uint32_t>(index));
}

/// The largest of the warp's words, in every lane.
[[nodiscard]] DEEPEP_DEVICE uint64_t warp_largest(uint64_t word) {
  DEEPEP_ROLLED
  for (int step = dev::kWarpSize / 2; step > 0; step /= 2) {
    const uint64_t other = dev::shuffle(word, dev::lane() ^ step);
    word = other > word ? other : word;
  }
  return word;
}

DEEPEP_DEVICE void select_topk(const SelectTopkArgs& args) {
  using namespace dev;
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_warps();
  for (int64_t t = static_cast<int64_t>(block()) * num_warps() + warp(); t < args.num_tokens; t += step) {
    const float* scores = args.scores + t * args.num_experts;
    uint64_t last = ~uint64_t{0};
    DEEPEP_ROLLED
    for (int k = 0; k < args.num_topk; ++k) {
      uint64_t largest = 0;
      for (int e = lane(); e < args.num_experts; e += kWarpSize) {
        const uint64_t word = ordered_word(load_once(scores + e), e);
        if (word < last && word > largest) largest = word;
      }
      last = warp_largest(largest);
      const uint32_t index = kIndexBase - static_cast<uint32_t>(last);
      if (lane() == 0) store(args.topk_idx + t * args.num_topk + k, static_cast<int64_t>(index));
    }
  }
}

DEEPEP_KERNEL(select_topk_kernel, SelectTopkArgs, kRowThreads) { select_topk(args); }

}  // namespace deepep::kernels
