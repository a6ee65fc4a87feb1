// A dispatch as its blocks see it: the call, its shared memory, and which rows of which tokens each warp
// writes.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/common/lines.hpp"
#include "layout/counts.hpp"

namespace deepep::kernels {

inline constexpr int kDispatchThreads = 512;
inline constexpr int kExpandedThreads = 384;  // of mode kExpanded: each has more registers
inline constexpr int kMaxParts = 4;  // of a row, where tokens are few

/// The metadata of all ranks, at the start of a block's dynamic shared memory.
struct MetadataShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t slot() const {                // uint32 [R, kSlotArrays], units of 16 bytes
    return layout::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t capacity() const {  // uint32 [R]
    return slot() + layout::kSlotArrays * per_rank();
  }
  [[nodiscard]] DEEPEP_HD int64_t push_blocks() const { return capacity() + per_rank(); }  // uint32 [R]
  [[nodiscard]] DEEPEP_HD int64_t stream_tokens() const { return push_blocks() + per_rank(); }  // uint32 [R]
  /// uint32: bits of Phases
  [[nodiscard]] DEEPEP_HD int64_t failed() const { return stream_tokens() + per_rank(); }
  /// uint32: bits of those Phases in which wait_metadata failed; nobody adds to it afterwards.
  [[nodiscard]] DEEPEP_HD int64_t recv_failed() const { return failed() + 4; }
  /// uint32: the same of post_counts_to_host
  [[nodiscard]] DEEPEP_HD int64_t post_failed() const { return failed() + 8; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return failed() + 16; }

 private:
  [[nodiscard]] DEEPEP_HD int64_t per_rank() const {
    return layout::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
};

/// The block's dynamic shared memory: metadata, and what place_tokens counts.
struct DispatchShared {
  int num_ranks;
  int warps;

  /// Tokens of each warp's own that go to each rank: int32 [warps, R].
  [[nodiscard]] DEEPEP_HD int64_t own() const {
    return layout::align_up(MetadataShared{num_ranks}.bytes(), 16);
  }
  /// The same of each warp's share of the tokens before the block's: int32 [warps, R].
  [[nodiscard]] DEEPEP_HD int64_t before() const { return own() + 4 * static_cast<int64_t>(warps) * num_ranks; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return before() + 4 * static_cast<int64_t>(warps) * num_ranks;
  }
};

struct DispatchCall {
  const DispatchArgs& args;
  const Group& g;
  uint32_t epoch;
  dev::Deadline deadline;
  Lines lines;
};

/// Reads the epoch and clears the block's words. A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE DispatchCall start(const DispatchArgs& args, const Lines& lines = {}) {
  using namespace dev;
  enter(lines, Step::kStart);
  const Group& g = args.group;
  const MetadataShared shared{g.num_ranks};
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> recv_failed(shared.recv_failed());
  SharedArray<uint32_t> post_failed(shared.post_failed());
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->dispatch_epoch);
  if (thread() == 0) {
    failed.set(0, 0);
    recv_failed.set(0, 0);
    post_failed.set(0, 0);
  }
  return {.args = args, .g = g, .epoch = epoch, .deadline = deadline, .lines = lines};
}

/// Block 0 posts this rank's metadata, and what else concerns the whole rank.
[[nodiscard]] DEEPEP_DEVICE bool is_leader_block() { return dev::block() == 0; }

/// The block that posts to a host that waits: the second one, or the first that does not push.
[[nodiscard]] DEEPEP_DEVICE bool is_host_block(const DispatchArgs& args) {
  if (args.mode == DispatchMode::kExpanded) return dev::block() == args.push_blocks;
  return dev::block() == (dev::num_blocks() > 1 ? 1 : 0);
}

/// Block 0: peers may write to this rank's staging in the combines to come.
DEEPEP_DEVICE void grant_credit(const DispatchCall& call) {
  if (is_leader_block()) grant_credit(call.g, dev::load(&call.g.state->combine_epoch));
}

DEEPEP_DEVICE void advance_epoch(const DispatchCall& call) {
  LocalState* state = call.g.state;
  if (dev::thread() != dev::num_threads() - 1) return;
  if (!advance_epoch(call.g, &state->dispatch_epoch, call.epoch) || !finds_ranks(call.args.mode)) return;
  // Of the next call, nothing has been claimed.
  dev::store(&state->groups_claimed, 0u);
  dev::store(&state->experts_claimed, 0u);
  dev::store(&state->experts_counted, 0u);
  dev::store(&state->rows_claimed, 0u);
  dev::store(&state->pushes_started, 0u);
}

/// True on one thread of a block in which something went wrong: it has a fault to report.
[[nodiscard]] DEEPEP_DEVICE bool finish(const DispatchCall& call) {
  using namespace dev;
  SharedArray<uint32_t> failed(MetadataShared{call.g.num_ranks}.failed());
  enter(call.lines, Step::kFinish);
  sync_block();
  enter(call.lines, Step::kEnd);
  return thread() == 0 && failed.get(0) != 0;
}

/// The part of the tokens' ways that concerns a block: to other ranks, to this one, or both.
struct DispatchRole {
  bool push;
  bool local;
  int64_t begin;  // tokens [begin, end)
  int64_t end;
};

/// The ranks whose rows the role writes, as bits.
[[nodiscard]] DEEPEP_DEVICE uint32_t wanted_ranks(const DispatchRole& role, const Group& g) {
  const uint32_t self = 1u << g.rank;
  return g.live & ((role.local ? self : 0u) | (role.push ? ~self : 0u));
}

/// The tokens of one warp: those of its block are dealt out in stretches. Where there are fewer than warps,
/// several warps share a token, each a part of its row.
struct WarpTokens {
  int64_t begin;  // tokens [begin, end)
  int64_t end;
  int part;
  int parts;
};

/// The warps of a block that write rows: where rows are spread as they come, the last one of a push block
/// follows the others, and signals.
[[nodiscard]] DEEPEP_DEVICE int writing_warps(const DispatchArgs& args, const DispatchRole& role) {
  return dev::num_warps() - (args.mode == DispatchMode::kExpanded && role.push ? 1 : 0);
}

[[nodiscard]] DEEPEP_DEVICE WarpTokens tokens_of_warp(const DispatchArgs& args, const DispatchRole& role) {
  const int tokens = static_cast<int>(role.end - role.begin);
  if (tokens == 0) return {role.end, role.end, 0, 1};
  const int warps = writing_warps(args, role);
  if (args.mode == DispatchMode::kExpanded) {  // a row has one warp, which says when it is there
    const layout::SplitOf<int> split{tokens, warps};
    if (dev::warp() >= warps) return {role.end, role.end, 0, 1};
    return {role.begin + split.begin(dev::warp()), role.begin + split.end(dev::warp()), 0, 1};
  }
  int parts = 1;
  DEEPEP_ROLLED
  while (parts < kMaxParts && tokens * (parts + 1) <= warps) ++parts;
  const int teams = warps / parts;
  const layout::SplitOf<int> split{tokens, teams};
  const int team = dev::warp() / parts;
  if (team >= teams) return {role.end, role.end, 0, parts};
  return {role.begin + split.begin(team), role.begin + split.end(team), dev::warp() - team * parts, parts};
}

/// Local blocks come first: block 0 posts metadata, and has time to. Not so where they wait for the peers'
/// rows, which would keep push blocks that come later from starting. The push blocks' flags are numbered from
/// 0.
[[nodiscard]] DEEPEP_DEVICE int first_push_block(const DispatchArgs& args) {
  return args.mode == DispatchMode::kExpanded ? 0 : dev::num_blocks() - args.push_blocks;
}

/// A local block's number among them.
[[nodiscard]] DEEPEP_DEVICE int local_block(const DispatchArgs& args) {
  return dev::block() - (args.mode == DispatchMode::kExpanded ? args.push_blocks : 0);
}

[[nodiscard]] DEEPEP_DEVICE DispatchRole role_of_block(const DispatchArgs& args) {
  const int push = dev::block() - first_push_block(args);
  const int local = local_block(args);
  DispatchRole role{push >= 0 && push < args.push_blocks, local >= 0 && local < args.local_blocks, 0, 0};
  // Blocks of both roles share their tokens with all others: then the two counts are equal.
  const layout::TokenSplit& split = role.push ? args.push_split : args.local_split;
  const int part = role.push ? push : local;
  role.begin = split.begin(part);
  role.end = split.end(part);
  return role;
}

/// The tokens of this warp, and the rows of them that concern its block.
struct WarpShare {
  DispatchRole role;
  WarpTokens mine;
};

[[nodiscard]] DEEPEP_DEVICE WarpShare assign_tokens(const DispatchCall& call) {
  const DispatchRole role = role_of_block(call.args);
  return {role, tokens_of_warp(call.args, role)};
}

}  // namespace deepep::kernels
