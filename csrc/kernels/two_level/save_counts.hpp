// The counts of all ranks, for the host and for the handle; and what a dispatch that was given up leaves there.
#pragma once

#include "kernels/two_level/wait_metadata.hpp"

namespace deepep::kernels {

/// As in one level: to a host that waits, how many rows come and for which experts, or with `why` that they do
/// not. One block, all threads.
DEEPEP_DEVICE void post_counts_to_host(const TwoLevelDispatchCall& call, uint32_t why) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const Group& g = call.near.g;
  if (args.host == nullptr || !is_host_block(args)) return;
  const int ranks = call.all.num_ranks;
  const layout::MailboxWords words{ranks};
  const MetadataShared near{g.num_ranks};
  const TwoLevelDispatchShared shared = shared_of(call.args);
  SharedArray<uint32_t> failed(near.failed());
  SharedArray<uint32_t> post_failed(near.post_failed());
  const auto post = [&](uint64_t* word, int64_t value) {
    store<relaxed, sys_scope>(word, pack_tagged(static_cast<uint32_t>(value), args.ticket));
  };
  for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
    uint32_t total = 0;
    for (int s = 0; s < ranks && why == 0 && has_expert_counts(args); ++s) {
      uint32_t value = 0;
      if (!is_live(call.all, s)) continue;
      const uint64_t* word = metadata_at(call, s, words.expert_count(l));
      if (!wait_tag<acquire, sys_scope>(word, call.near.epoch, call.near.deadline, value)) {
        note_rank(g, Phase::kCounts, s, call.near.epoch, value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
        post_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      }
      total += value;
    }
    post(&args.host->lists[ranks * ranks + l], total);
  }
  for (int i = thread(); i < ranks * ranks; i += num_threads())
    post(&args.host->lists[i], posted_count(call, i / ranks, i % ranks));
  sync_block();
  if (thread() != 0) return;
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<int32_t> sends(shared.sends());
  int64_t most = 0, returned = 0;
  DEEPEP_ROLLED
  for (int r = 0; r < ranks; ++r) {
    most = layout::max_of(most, int64_t{rows.get(r)});
    returned += r == call.all.rank ? 0 : sends.get(r);
  }
  post(&args.host->num_rows, rows.get(call.all.rank));
  post(&args.host->max_rows, most);
  post(&args.host->num_returned, returned);
  post(&args.host->phase, why | post_failed.get(0));
}

/// Block 0: the counts of all ranks into the handle, for combine and cached dispatches.
DEEPEP_DEVICE void save_counts(const TwoLevelDispatchCall& call) {
  using namespace dev;
  if (!is_leader_block()) return;
  const int ranks = call.all.num_ranks;
  for (int i = thread(); i < ranks * ranks; i += num_threads())
    store(call.args.dispatch.counts + i, posted_count(call, i / ranks, i % ranks));
}

/// As in one level.
DEEPEP_DEVICE void pad_indices(const TwoLevelDispatchCall& call, const WarpShare& share) {
  pad_indices(call.near, share, [&] {
    return int64_t{dev::SharedArray<int32_t>(shared_of(call.args).rows()).get(call.all.rank)};
  });
}

/// A dispatch that was given up leaves a handle of no rows: a combine queued behind it does no harm. The rows
/// of tokens are written by whichever block has claimed them, so here only block 0's counts are cleared, in
/// which a combine looks first.
DEEPEP_DEVICE void clear_counts(const TwoLevelDispatchCall& call) {
  using namespace dev;
  if (!is_leader_block()) return;
  const int ranks = call.all.num_ranks;
  for (int i = thread(); i < ranks * ranks; i += num_threads()) store(call.args.dispatch.counts + i, 0);
}

}  // namespace deepep::kernels
