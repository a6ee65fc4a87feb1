// The counts of a dispatch to its host, while the rows travel.
#pragma once

#include "kernels/dispatch/metadata.hpp"

namespace deepep::kernels {

/// Posts to a host that waits how many rows come and for which experts, or with `why` that they do not. One
/// block, all threads. Tagged words, so that no word waits for another.
DEEPEP_DEVICE void post_counts_to_host(const DispatchCall& call, uint32_t why) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  if (args.host == nullptr || !is_host_block(args)) return;
  const layout::MailboxWords words{g.num_ranks};
  const MetadataShared shared{g.num_ranks};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> post_failed(shared.post_failed());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const auto post = [&](uint64_t* word, int64_t value) {
    store<relaxed, sys_scope>(word, pack_tagged(static_cast<uint32_t>(value), args.ticket));
  };
  for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
    uint32_t total = 0;
    for (int s = 0; s < g.num_ranks && why == 0 && has_expert_counts(args); ++s) {
      uint32_t value = 0;
      if (!is_live(g, s)) continue;
      const int64_t offset = g.control.mailbox(s, call.epoch) + 8 * words.expert_count(l);
      if (!wait_tag<acquire, sys_scope>(at<uint64_t>(g, g.rank, offset), call.epoch, call.deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << s, call.epoch, value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
        post_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      }
      total += value;
    }
    post(&args.host->lists[g.num_ranks * g.num_ranks + l], total);
  }
  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads())
    post(&args.host->lists[i], counts.get(i));
  sync_block();
  if (thread() != 0) return;
  int64_t most = 0;
  for (int d = 0; d < g.num_ranks; ++d) {
    const int64_t rows = layout::first_row_of_source(count, g.num_ranks, d);
    most = rows > most ? rows : most;
  }
  post(&args.host->num_rows, layout::first_row_of_source(count, g.num_ranks, g.rank));
  post(&args.host->max_rows, most);
  post(&args.host->num_returned, layout::first_staging_row(count, g.rank, g.num_ranks));
  post(&args.host->phase, why | post_failed.get(0));
}

}  // namespace deepep::kernels
