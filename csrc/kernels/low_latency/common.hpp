// What the phases of both low-latency operations share: top-k entries, hashes, who of a block takes which part
// of what.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/low_latency/args.hpp"

namespace deepep::kernels {

inline constexpr int kLowLatencyThreads = 512;
/// Up to so many warps of a block share a row.
inline constexpr int kMaxWarpsOfRow = 16;

/// In place of a digest, the word of a rank whose call is made by other means; digests are odd.
inline constexpr uint32_t kElsewhere = 2;

/// What a rank posts that takes no part in a call.
template <class Args>
[[nodiscard]] DEEPEP_HD uint32_t absence_of(const Args& args) {
  return args.elsewhere ? kElsewhere : kRefusal;
}

/// Entry i of a [T, K] array of top-k indices; -1 for no expert.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE int expert_at(const Args& args, int i) {
  using namespace dev;
  const int num_experts = args.num_local_experts * args.group.num_ranks;
  const int64_t entry = args.index_bytes == 8
                            ? load_once(static_cast<const int64_t*>(args.topk_idx) + i)
                            : int64_t{load_once(static_cast<const int32_t*>(args.topk_idx) + i)};
  return entry >= 0 && entry < num_experts ? static_cast<int>(entry) : -1;
}

/// One value of a hash whose parts are summed, so that every thread can add some of them.
[[nodiscard]] DEEPEP_HD uint32_t hash_part(uint32_t place, uint32_t value) {
  uint32_t h = (place + 1u) * 0x9e3779b1u ^ value * 0x85ebca77u;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  h = (h ^ (h >> 12)) * 0x297a2d39u;
  return h ^ (h >> 15);
}

/// This thread's part of the hash of a rank's top-k indices, and of its weights if they travel with the
/// dispatch.
template <class Args>
[[nodiscard]] DEEPEP_DEVICE uint32_t hash_topk(const Args& args, bool with_weights) {
  using namespace dev;
  uint32_t hash = 0;
  for (int i = thread(); i < args.num_tokens * args.num_topk; i += num_threads()) {
    hash += hash_part(2u * i, static_cast<uint32_t>(expert_at(args, i)));
    if (with_weights) hash += hash_part(2u * i + 1u, load_once(args.topk_weights + i));
  }
  return hash;
}

/// What a warp takes of `count` rows of its block: rows first, first + step, ..., of each the `part`-th of
/// `parts`.
struct WarpRows {
  int first;
  int step;
  int part;
  int parts;
};

[[nodiscard]] DEEPEP_DEVICE WarpRows rows_of_warp(int count) {
  const int warps = dev::num_warps();
  int parts = 1;
  DEEPEP_ROLLED
  while (parts < kMaxWarpsOfRow && count * (parts + 1) <= warps) ++parts;
  const int team = dev::warp() / parts;
  const int teams = warps / parts;
  return {team < teams ? team : count, teams, dev::warp() - team * parts, parts};
}

/// Of `count` rows dealt to blocks in turn, how many this block has.
[[nodiscard]] DEEPEP_DEVICE int rows_of_block(int count) {
  const int left = count - dev::block();
  return left > 0 ? (left + dev::num_blocks() - 1) / dev::num_blocks() : 0;
}

/// Messages of all sources as one list, source by source from `first_source` on.
struct MessageList {
  dev::SharedArray<int32_t> first;  // [R + 1]: of each source in that order, and the end
  int first_source;
  int num_ranks;

  [[nodiscard]] DEEPEP_DEVICE int source(int order) const {
    const int s = first_source + order;
    return s < num_ranks ? s : s - num_ranks;
  }
  [[nodiscard]] DEEPEP_DEVICE int size() const { return first.get(num_ranks); }
};

/// One message of the list.
struct MessageAt {
  int source;
  int position;  // among those of its source
};

[[nodiscard]] DEEPEP_DEVICE MessageAt message_at(const MessageList& list, int message) {
  int order = 0;
  DEEPEP_ROLLED
  while (order + 1 < list.num_ranks && list.first.get(order + 1) <= message) ++order;
  return {list.source(order), message - list.first.get(order)};
}

/// Fills the list from each source's number of messages. One thread; `count(s)`.
template <class Count>
DEEPEP_DEVICE void list_messages(const MessageList& list, const Count& count) {
  dev::SharedArray<int32_t> first = list.first;
  int32_t sum = 0;
  DEEPEP_ROLLED
  for (int order = 0; order < list.num_ranks; ++order) {
    first.set(order, sum);
    sum += count(list.source(order));
  }
  first.set(list.num_ranks, sum);
}

/// Waits for a word that carries this call's epoch; notes a fault of `phase` if it does not come. Acquire: by
/// the word its source says, too, that what it read in the operation before has been read, and later kernels
/// write there.
[[nodiscard]] DEEPEP_DEVICE bool wait_word(const Group& g, int64_t offset, int source, Phase phase,
                                           uint32_t epoch, dev::Deadline deadline, uint32_t& value) {
  using namespace dev;
  const uint64_t* word = at<uint64_t>(g, g.rank, offset);
  if (wait_tag<acquire, sys_scope>(word, epoch, deadline, value)) return true;
  note_fault(g, phase, 1u << source, epoch, unpack_tagged(load<relaxed, sys_scope>(word)).tag);
  return false;
}

/// Waits for the flag of a row that `source` writes; the same.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_flag(const Call& call, const uint32_t* flag, int source, Phase phase) {
  using namespace dev;
  uint32_t seen = 0;
  if (wait_masked<acquire, sys_scope>(flag, 0xffffffffu, call.epoch, call.deadline, seen)) return true;
  note_fault(call.g, phase, 1u << source, call.epoch, seen);
  return false;
}

}  // namespace deepep::kernels
