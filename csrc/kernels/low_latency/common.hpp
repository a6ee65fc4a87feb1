// What the phases of both low-latency operations share: top-k entries, hashes, who of a block takes which part
// of what.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/common/lines.hpp"
#include "kernels/low_latency/share.hpp"

/// A kernel that, in the form that is `watching`, masks ranks that are missing (mend.hpp) and measures how long
/// it waits for each; the other form pays for neither.
#define DEEPEP_WATCHING_KERNEL(name, Args, threads) \
  DEEPEP_KERNEL_IN_FORMS(name, Args, threads, watching, ::deepep::kernels::has_to_watch(args))

/// The same with a form more, in which its warps write time lines (common/lines.hpp), and it does not watch.
#define DEEPEP_WATCHING_RECORDED_KERNEL(name, Args, threads)                                                  \
  DEEPEP_DEVICE void name##_lines(const Args& args, bool watching, const ::deepep::kernels::Lines& lines);    \
  DEEPEP_WATCHING_KERNEL(name, Args, threads) { name##_lines(args, watching, {}); }                           \
  DEEPEP_KERNEL(name##_recorded, ::deepep::kernels::Recorded<Args>, threads) {                                \
    name##_lines(args.args, false, args.lines);                                                                \
  }                                                                                                           \
  DEEPEP_DEVICE void name##_lines(const Args& args, bool watching, const ::deepep::kernels::Lines& lines)

namespace deepep::kernels {

inline constexpr int kLowLatencyThreads = 512;
/// Channels that a warp moves at once, 16 a lane.
inline constexpr int kUnit = 16 * dev::kWarpSize;

/// Entry i of a [T, K] array of top-k indices, as it is.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE int64_t load_entry(const Args& args, int i) {
  using namespace dev;
  return args.index_bytes == 8 ? load_once(static_cast<const int64_t*>(args.topk_idx) + i)
                               : int64_t{load_once(static_cast<const int32_t*>(args.topk_idx) + i)};
}

/// The expert of an entry; -1 for none.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE int expert_of(const Args& args, int64_t entry) {
  const int num_experts = args.num_local_experts * args.group.num_ranks;
  return entry >= 0 && entry < num_experts ? static_cast<int>(entry) : -1;
}

/// Entry i's expert.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE int expert_at(const Args& args, int i) {
  return expert_of(args, load_entry(args, i));
}

/// One value of a hash whose parts are summed, so that every thread can add some of them.
[[nodiscard]] DEEPEP_HD uint32_t hash_part(uint32_t place, uint32_t value) {
  uint32_t h = (place + 1u) * 0x9e3779b1u ^ value * 0x85ebca77u;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  h = (h ^ (h >> 12)) * 0x297a2d39u;
  return h ^ (h >> 15);
}

/// The hash of a rank's top-k indices, and of its weights if they travel with the dispatch, added to a word of
/// shared memory. All threads; a block barrier has to follow.
template <class Args>
DEEPEP_DEVICE void hash_topk(const Args& args, bool with_weights, int64_t word) {
  using namespace dev;
  uint32_t hash = 0;
  for (int i = thread(); i < args.num_tokens * args.num_topk; i += num_threads()) {
    hash += hash_part(2u * i, static_cast<uint32_t>(expert_at(args, i)));
    if (with_weights) hash += hash_part(2u * i + 1u, load_once(args.topk_weights + i));
  }
  const auto of_warp = static_cast<uint32_t>(warp_sum(static_cast<int>(hash)));
  if (lane() == 0) SharedArray<uint32_t>(word).add(0, of_warp);
}

/// Warps of a block in teams of 2^shift, each at one thing at a time.
struct Team {
  int number;
  int teams;
  int part;   // of this warp,
  int parts;  // in its team
};

/// Number `warp` of `warps`.
[[nodiscard]] DEEPEP_DEVICE Team team_of(int warp, int warps, int shift) {
  const int parts = 1 << shift;
  return {warp >> shift, warps >> shift, warp & (parts - 1), parts};
}
[[nodiscard]] DEEPEP_DEVICE Team team_of_warp(int shift) {
  return team_of(dev::warp(), dev::num_warps(), shift);
}

/// Item i of those that a block has of a row of them dealt in turn from the last block on: the first block,
/// which has words to post, has the fewest. Past any end where it has none.
[[nodiscard]] DEEPEP_DEVICE int item_of_block(int block, int i, int first_block) {
  const int blocks = dev::num_blocks();
  return block < first_block ? 0x7fffffff : blocks - 1 - block + i * (blocks - first_block);
}

/// Which form a launch takes.
template <class Args>
[[nodiscard]] DEEPEP_HD bool has_to_watch(const Args& args) {
  return args.group.shrinks || args.waits != nullptr;
}

/// What a launch finds in this rank's own words.
struct Before {
  uint32_t epoch;   // of the call before
  uint32_t masked;  // ranks that kernels have masked
};

/// The ranks that take part in a call, as bits.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE uint32_t live_of(const Args& args, const Before& before) {
  return args.group.live & ~before.masked;
}

/// A token of a source, on its way to or from it, or a strip of that.
struct MessageAt {
  int source;
  int token;  // -1: there is none
  int strip = 0;
};

/// Number `item` of those that all blocks share: source by source from the next rank on, this rank last; first
/// those of as many tokens as this rank has, so that blocks have alike when ranks have.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE MessageAt message_at(const Args& args, int item) {
  const LowLatencyShare& share = args.share;
  const int strip = item & ((1 << share.strip_shift) - 1);
  int message = item >> share.strip_shift;
  int order = 0, token = 0;
  if (message < share.num_sources * args.num_tokens) {
    order = share.by_tokens.quotient(message);
    token = message - order * args.num_tokens;
  } else {
    message -= share.num_sources * args.num_tokens;
    const int rest = args.max_tokens - args.num_tokens;
    if (message >= share.num_sources * rest) return {0, -1};
    order = share.by_rest.quotient(message);
    token = args.num_tokens + message - order * rest;
  }
  int source = args.group.rank + 1 + order;
  if (source >= args.group.num_ranks) source -= args.group.num_ranks;
  return {source, token, strip};
}

/// Which tokens of each source there are, as bits in a block's shared memory: [R, M / 32, rounded up].
struct Presence {
  dev::SharedArray<uint32_t> bits;
  int words;  // of a source

  [[nodiscard]] DEEPEP_DEVICE bool has(int source, int token) const {
    return (bits.get(source * words + token / 32) >> (token % 32)) & 1u;
  }
};

/// The messages that a team has.
template <class Args>
struct MessageWalk {
  const Args& args;
  Presence present;
  int block;
  int step;
  int i;  // of the block's

  /// The next that there is.
  [[nodiscard]] DEEPEP_DEVICE MessageAt next() {
    DEEPEP_ROLLED
    for (;; i += step) {
      const MessageAt where = message_at(args, item_of_block(block, i, args.share.first_worker));
      if (where.token >= 0 && !present.has(where.source, where.token)) continue;
      i += step;
      return where;
    }
  }
};

/// By any warp: the messages of its team from the first on.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE auto walk_of(const Call& call, const Presence& present, const Team& team) {
  return MessageWalk<typename Call::Args>{
      .args = call.args, .present = present, .block = call.block, .step = team.teams, .i = team.number};
}

/// The warp that raises a block's flags: the last, which waits until what they follow is there.
[[nodiscard]] DEEPEP_DEVICE bool is_signaller() { return dev::warp() == dev::num_warps() - 1; }

/// How far a block is with receiving once more, without ranks that are missing (mend.hpp): words of its shared
/// memory, from that on which a call names.
struct Mending {
  enum Word {
    kRound,    // of receiving; 0: as every block does
    kMissing,  // ranks that are left out in this round
    kNext,     // what comes behind it
    kWords
  };
};

/// True of a rank whose memory is mapped here: all are, but those of other domains (low_latency_far).
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool is_mapped(const Call& call, int rank) {
  if constexpr (Call::kIsFar)
    return ((call.far.bits >> rank) & 1u) == 0;
  else
    return true;
}

/// The rank that a message for `rank` is written for or put to: itself, but where there are gateways
/// (low_latency_rails).
template <class Call>
[[nodiscard]] DEEPEP_DEVICE int hop_to(const Call& call, int rank) {
  if constexpr (Call::kIsRail)
    return next_hop(call, rank);
  else
    return rank;
}

/// The ranks that take part, while a call runs.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool is_live(const Call& call, int rank) {
  return (call.live >> rank) & 1u;
}

/// Advances an operation's epoch, behind a block barrier. By a warp that others seldom wait for.
template <class Call>
DEEPEP_DEVICE void advance_epoch(const Call& call, uint32_t* epoch) {
  using namespace dev;
  const int one = layout::max_of(num_threads() - 2 * kWarpSize, 0);
  if (thread() == one) advance_epoch(call.g, epoch, call.epoch);
}

}  // namespace deepep::kernels
