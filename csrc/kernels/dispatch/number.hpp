// The place of each top-k entry among its rank's entries of the same expert, tokens ascending, then k. With the
// counts of all ranks it gives the entry's row in the expanded layout of the expert's rank.
//
// Blocks claim groups of tokens, a stretch for each warp. They post how many of a group's entries name each
// expert in tagged words, add up those of the groups before, and number their own. So no block waits for one
// that has not started: who has claimed a group posts its words before it waits.
#pragma once

#include "kernels/dispatch/metadata.hpp"

namespace deepep::kernels {

/// In place of a place that could not be found out: no row, whatever is added.
inline constexpr int32_t kNoPlace = INT32_MIN;

/// Tokens of a group.
[[nodiscard]] DEEPEP_DEVICE int tokens_a_group() { return dev::num_warps() * layout::kStretch; }

/// One even where there is no token: somebody has to post that there are no entries.
[[nodiscard]] DEEPEP_DEVICE int num_numbered_groups(const DispatchArgs& args) {
  return layout::max_of(static_cast<int>(layout::ceil_div(args.num_tokens, tokens_a_group())), 1);
}

/// The expert that an entry names, -1 for none.
[[nodiscard]] DEEPEP_DEVICE int expert_of_entry(const DispatchArgs& args, int64_t entry) {
  const int64_t index = args.index_bytes == 8
                            ? dev::load_once(static_cast<const int64_t*>(args.topk_idx) + entry)
                            : int64_t{dev::load_once(static_cast<const int32_t*>(args.topk_idx) + entry)};
  return index >= 0 && index < int64_t{args.num_local_experts} * args.group.num_ranks ? static_cast<int>(index)
                                                                                     : -1;
}

/// Calls visit(entry, expert) for the entries of this warp's stretch of a group, one a lane, in order; the
/// expert is -1 where there is none, or no entry. Whole warps.
template <class Visit>
DEEPEP_DEVICE void for_each_entry(const DispatchArgs& args, int group, const Visit& visit) {
  using namespace dev;
  const int64_t token = (int64_t{group} * num_warps() + warp()) * layout::kStretch;
  const int64_t end = layout::min_of(token + layout::kStretch, args.num_tokens) * args.num_topk;
#pragma unroll 1
  for (int64_t first = token * args.num_topk; first < end; first += kWarpSize) {
    const int64_t entry = first + lane();
    visit(entry, entry < end ? expert_of_entry(args, entry) : -1);
  }
}

[[nodiscard]] DEEPEP_DEVICE uint64_t* group_words(const DispatchArgs& args, int group) {
  const layout::CountingLayout at{args.group.num_ranks};
  return reinterpret_cast<uint64_t*>(args.counting + at.group_entries()) + group * layout::kMaxNumberedExperts;
}

[[nodiscard]] DEEPEP_DEVICE uint32_t* numbered_word(const DispatchArgs& args, int group) {
  const layout::CountingLayout at{args.group.num_ranks};
  return reinterpret_cast<uint32_t*>(args.counting + at.numbered()) + group;
}

/// Into the counters: how many entries of the warp's stretch name each expert. Whole block.
DEEPEP_DEVICE void count_group(const DispatchArgs& args, int group, const NumberingShared& shared) {
  using namespace dev;
  SharedArray<int32_t> counters(shared.counters());
  for (int i = thread(); i < num_warps() * shared.num_experts; i += num_threads()) counters.set(i, 0);
  sync_block();
  for_each_entry(args, group, [&](int64_t, int expert) {
    if (expert >= 0) counters.add(warp() * shared.num_experts + expert, 1);
  });
  sync_block();
}

/// The counters become the places of each warp's first entries; the group's entries are posted. A thread an
/// expert. The last group's block posts those of all groups to the experts' ranks.
DEEPEP_DEVICE void post_group(const DispatchCall& call, int group, const NumberingShared& shared) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<int32_t> counters(shared.counters());
  SharedArray<int32_t> totals(shared.bases());  // not needed yet for what they are
  SharedArray<uint32_t> recv_failed(MetadataShared{g.num_ranks}.recv_failed());
  for (int e = thread(); e < shared.num_experts; e += num_threads()) {
    int32_t total = 0;
    for (int w = 0; w < num_warps(); ++w) {
      const int32_t count = counters.get(w * shared.num_experts + e);
      counters.set(w * shared.num_experts + e, total);
      total += count;
    }
    totals.set(e, total);
    store<relaxed, gpu_scope>(group_words(args, group) + e,
                              pack_tagged(static_cast<uint32_t>(total), call.epoch));
  }
  const layout::MailboxWords words{g.num_ranks};
  for (int e = thread(); e < shared.num_experts; e += num_threads()) {
    uint32_t before = 0;
    bool came = true;
    for (int earlier = 0; earlier < group; ++earlier) {
      const uint64_t* word = group_words(args, earlier) + e;
      uint32_t value = 0;
      came = wait_tag<relaxed, gpu_scope>(word, call.epoch, call.deadline, value) && came;
      before += value;
    }
    if (!came) {
      note_fault(g, Phase::kCounts, 1u << g.rank, call.epoch, before);
      recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      continue;
    }
    for (int w = 0; w < num_warps(); ++w)
      counters.set(w * shared.num_experts + e,
                   counters.get(w * shared.num_experts + e) + static_cast<int32_t>(before));
    const int peer = args.experts_per_rank.quotient(e);
    if (group + 1 != num_numbered_groups(args) || !is_live(g, peer)) continue;
    const int64_t word = 8 * words.expert_count(args.experts_per_rank.remainder(e));
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, g.control.mailbox(g.rank, call.epoch) + word),
                              pack_tagged(before + static_cast<uint32_t>(totals.get(e)), call.epoch));
  }
  sync_block();
}

/// The lanes whose expert is this one's, as bits. One warp; of no use to a lane without one.
[[nodiscard]] DEEPEP_DEVICE uint32_t lanes_alike(int expert, int num_experts) {
  uint32_t alike = dev::ballot(expert >= 0);
#pragma unroll 1
  for (int bit = 0; (1 << bit) < num_experts; ++bit) {
    const bool is_set = (expert >> bit) & 1;
    const uint32_t with = dev::ballot(is_set);
    alike &= is_set ? with : ~with;
  }
  return alike;
}

/// Numbers the entries of this warp's stretch.
DEEPEP_DEVICE void place_entries(const DispatchArgs& args, int group, const NumberingShared& shared) {
  using namespace dev;
  SharedArray<int32_t> counters(shared.counters());
  for_each_entry(args, group, [&](int64_t entry, int expert) {
    const uint32_t alike = lanes_alike(expert, shared.num_experts);
    const int next = warp() * shared.num_experts + expert;
    int32_t place = 0;
    if (expert >= 0) {
      place = counters.get(next) + popcount(alike & ((1u << lane()) - 1u));
      store(args.expanded.places + entry, place);
    }
    sync_warp();
    if (expert >= 0 && (alike >> lane()) == 1u) counters.set(next, place + 1);
    sync_warp();
  });
}

/// All groups that this block claims, until none is left. Whole block.
DEEPEP_DEVICE void number_entries(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const NumberingShared shared = NumberingShared::of(args, num_warps());
  work_on_claims(args, &call.g.state->experts_claimed, num_numbered_groups(args), [&](int group) {
    count_group(args, group, shared);
    post_group(call, group, shared);
    place_entries(args, group, shared);
    sync_block();
    if (thread() == 0) store<release, gpu_scope>(numbered_word(args, group), call.epoch);
  });
}

/// Until the entries of the tokens [begin, begin + size) are numbered. Each thread for itself.
[[nodiscard]] DEEPEP_DEVICE bool wait_places(const DispatchCall& call, int64_t begin, int size) {
  using namespace dev;
  bool came = true;
  for (int group = static_cast<int>(begin / tokens_a_group());
       group <= static_cast<int>((begin + size - 1) / tokens_a_group()); ++group) {
    if (wait_equal<acquire, gpu_scope>(numbered_word(call.args, group), call.epoch, call.deadline)) continue;
    note_fault(call.g, Phase::kCounts, 1u << call.g.rank, call.epoch, 0u);
    SharedArray<uint32_t>(MetadataShared{call.g.num_ranks}.failed()).bit_or(0, uint32_t(Phase::kCounts));
    came = false;
  }
  return came;
}

}  // namespace deepep::kernels
