// What a dispatch's blocks post while they count where their rank's tokens go: tokens in stretches,
// stretches in groups that blocks claim, and the words in which the counts are.
#pragma once

#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// Tokens that a warp counts together, one a lane.
inline constexpr int kStretch = 32;
/// Stretches that are counted inside of a dispatch; with more, a layout kernel runs before it.
inline constexpr int kMaxStretches = 512;

/// Groups of tokens, a stretch for each warp of a block, that are numbered by expert together; and experts of
/// all ranks, of which a block has counters for each of its warps.
inline constexpr int kMaxNumberedGroups = 48;
inline constexpr int kMaxNumberedExperts = 1024;

/// The memory of a rank, in which its blocks count. Zeroed once.
struct CountingLayout {
  int num_ranks;

  /// Tagged 8-byte words [kMaxStretches, R]: tokens of each stretch for each rank.
  [[nodiscard]] DEEPEP_HD int64_t stretches() const { return 0; }
  /// uint32 [R * local experts]: top-k entries for each expert; zero between launches.
  [[nodiscard]] DEEPEP_HD int64_t experts() const { return numbered() + 4 * kMaxNumberedGroups; }
  /// Tagged 8-byte words [kMaxNumberedGroups, kMaxNumberedExperts]: each group's entries for each expert.
  [[nodiscard]] DEEPEP_HD int64_t group_entries() const { return int64_t{8} * kMaxStretches * num_ranks; }
  /// 4-byte words: the epoch of the last dispatch in which the group's entries had been numbered.
  [[nodiscard]] DEEPEP_HD int64_t numbered() const {
    return group_entries() + int64_t{8} * kMaxNumberedGroups * kMaxNumberedExperts;
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes(int max_local_experts) const {
    return experts() + int64_t{4} * num_ranks * max_local_experts;
  }
};

/// A rank's tokens in stretches, and those in groups.
struct StretchGroups {
  int num_stretches;
  int stretches_a_group;  // at most one for each warp of a block; 0: no groups, each block counts them all
  int num_groups;

  StretchGroups() = default;
  /// Tokens up to `alone_tokens` make no groups, if each warp has no more than one of their stretches.
  DEEPEP_HD StretchGroups(int64_t num_tokens, int num_blocks, int num_warps, int64_t alone_tokens)
      : num_stretches(static_cast<int>(ceil_div(num_tokens, kStretch))),
        stretches_a_group(
            num_tokens <= alone_tokens && num_stretches <= num_warps
                ? 0
                : min_of(max_of(static_cast<int>(ceil_div(num_stretches, num_blocks)), 1), num_warps)),
        num_groups(stretches_a_group == 0 ? 0 : static_cast<int>(ceil_div(num_stretches, stretches_a_group))) {}
};

}  // namespace deepep::layout
