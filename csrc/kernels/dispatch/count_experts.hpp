// How many top-k entries name each expert, for hosts that wait. Counted while the metadata travels: no row
// needs it.
#pragma once

#include "kernels/dispatch/metadata.hpp"

namespace deepep::kernels {

/// Entries for each expert; zero before and after the call.
[[nodiscard]] DEEPEP_DEVICE uint32_t* expert_totals(const DispatchArgs& args) {
  return reinterpret_cast<uint32_t*>(args.counting + layout::CountingLayout{args.group.num_ranks}.experts());
}

/// Adds the entries [begin, end) to their experts' totals. Whole block.
template <class Index>
DEEPEP_DEVICE void add_entries(const DispatchArgs& args, const Index* topk_idx, int64_t begin, int64_t end) {
  using namespace dev;
  const int64_t num_experts = int64_t{args.num_local_experts} * args.group.num_ranks;
  uint32_t* totals = expert_totals(args);
#pragma unroll 4
  for (int64_t i = begin + thread(); i < end; i += num_threads()) {
    const Index entry = load_once(topk_idx + i);
    if (entry >= 0 && entry < num_experts) fetch_add<relaxed, gpu_scope>(totals + entry, 1u);
  }
}

/// The same of the tokens [begin, end), as far as there are.
DEEPEP_DEVICE void add_tokens(const DispatchArgs& args, int64_t begin, int64_t end) {
  const int64_t last = layout::min_of(end, args.num_tokens) * args.num_topk;
  const int64_t first = begin * args.num_topk;
  if (args.index_bytes == 8)
    add_entries(args, static_cast<const int64_t*>(args.topk_idx), first, last);
  else
    add_entries(args, static_cast<const int32_t*>(args.topk_idx), first, last);
}

/// Each rank its own experts' totals, which are cleared. Whole block, behind all that has been added.
DEEPEP_DEVICE void post_experts(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  const layout::MailboxWords words{g.num_ranks};
  const int64_t mailbox = g.control.mailbox(g.rank, call.epoch);
  for (int e = thread(); e < args.num_local_experts * g.num_ranks; e += num_threads()) {
    const uint32_t total = dev::load<relaxed, gpu_scope>(expert_totals(args) + e);
    store<relaxed, gpu_scope>(expert_totals(args) + e, 0u);
    const int peer = args.experts_per_rank.quotient(e);
    if (!is_live(g, peer)) continue;
    const int64_t word = mailbox + 8 * words.expert_count(args.experts_per_rank.remainder(e));
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, word), pack_tagged(total, call.epoch));
  }
}

/// The host's block counts all experts where there are few tokens; else all blocks do, in groups of stretches
/// that they claim, and who comes last posts. Before the block waits for anything of other ranks.
DEEPEP_DEVICE void count_experts(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  if (args.host == nullptr) return;
  if (args.groups.stretches_a_group == 0) {
    if (!is_host_block(args)) return;
    add_tokens(args, 0, args.num_tokens);
    sync_block();
    post_experts(call);
    return;
  }
  LocalState* state = call.g.state;
  const int64_t tokens = int64_t{args.groups.stretches_a_group} * layout::kStretch;
  const int counted = work_on_claims(args, &state->experts_claimed, args.groups.num_groups, [&](int group) {
    add_tokens(args, group * tokens, (group + 1) * tokens);
  });
  SharedArray<uint32_t> is_last(CountingShared{call.g.num_ranks}.is_last());
  if (thread() == 0) {
    const uint32_t more = static_cast<uint32_t>(counted);
    is_last.set(0, more != 0 && fetch_add<acq_rel, gpu_scope>(&state->experts_counted, more) + more ==
                                    static_cast<uint32_t>(args.groups.num_groups));
  }
  sync_block();
  if (is_last.get(0) != 0) post_experts(call);
}

}  // namespace deepep::kernels
