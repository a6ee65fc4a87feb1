// Metadata in two hops: to the neighbours over NVLink, as in one level, and to the rank's gateway in each other
// domain by a put, which posts it to its own neighbours. So every rank learns the words of all, in its own
// mailboxes; receive arrays are known in their domain alone.
//
// Why what a put is made from may be written two calls later: this rank has received words of the peer of the
// call in between, which the peer posted when its kernel had ended, and that had read the put.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// Words of a source's metadata for a domain: what all of its ranks get, and the experts' counts of each.
[[nodiscard]] DEEPEP_HD int num_posted_words(int num_ranks, int domain_ranks, int local_experts) {
  return layout::MailboxWords{num_ranks}.expert_count(0) + domain_ranks * local_experts;
}

[[nodiscard]] DEEPEP_DEVICE int num_expert_words(const DispatchArgs& args) {
  return args.tokens_per_expert != nullptr ? args.num_local_experts : 0;
}

/// A word of this rank's metadata, for the experts of `first_rank` and those behind it.
[[nodiscard]] DEEPEP_DEVICE uint32_t metadata_word(const TwoLevelDispatchCall& call, int word, int first_rank,
                                                   bool is_near) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const int ranks = call.all.num_ranks;
  const layout::MailboxWords words{ranks};
  if (word >= words.expert_count(0))
    return static_cast<uint32_t>(
        load_once(args.tokens_per_expert + first_rank * args.num_local_experts + word - words.expert_count(0)));
  if (word == words.slot(layout::kSlotRows) && !is_near) return static_cast<uint32_t>(args.num_tokens);
  if (word >= ranks) return args.common_words[word - ranks];
  // A cached call's are in everybody's handle.
  if (args.mode == DispatchMode::kCached || !is_live(call.all, word)) return 0;
  return static_cast<uint32_t>(load_once(args.tokens_per_rank + word));
}

/// Block 0: this rank's metadata to its neighbours and to its gateways. Whole block.
DEEPEP_DEVICE void post_metadata(const TwoLevelDispatchCall& call) {
  using namespace dev;
  if (!is_leader_block()) return;
  const DispatchArgs& args = call.args.dispatch;
  const TwoLevelArgs& two_level = call.two_level;
  const Group& g = call.near.g;
  const int ranks = call.all.num_ranks;
  const layout::MailboxWords words{ranks};
  const int per_peer = words.expert_count(num_expert_words(args));
  for (int i = thread(); i < per_peer * g.num_ranks; i += num_threads()) {
    const int local = i / per_peer;
    const int word = i % per_peer;
    if (!is_live(g, local)) continue;
    // Relaxed, as in one level.
    store<relaxed, sys_scope>(
        at<uint64_t>(g, local, g.control.mailbox(call.all.rank, call.near.epoch) + 8 * word),
        pack_tagged(metadata_word(call, word, call.all.first_neighbour + local, true), call.near.epoch));
  }
  const Rails& rails = two_level.rails;
  const int64_t parity = layout::WindowTurn{static_cast<int64_t>(load(&two_level.state->dispatches))}.half();
  const int posted =
      num_posted_words(ranks, static_cast<int>(two_level.staging.domain_ranks), num_expert_words(args));
  for (int i = thread(); i < posted * rails.num_out; i += num_threads()) {
    const int o = i / posted;
    const int word = i % posted;
    // A smaller domain's last words are nobody's.
    const bool is_used = word < words.expert_count(rails.out_size[o] * num_expert_words(args));
    auto* out = remote_at<uint64_t>(two_level, two_level.layout.mailbox_out(rails.out[o], parity)) + word;
    store(out, uint64_t{is_used ? metadata_word(call, word, rails.out_first[o], false) : 0u});
  }
  sync_block();
  for (int o = thread(); o < rails.num_out; o += num_threads()) {
    const int rail = rails.out[o];
    const int there = rails.there[rail];
    fence<acq_rel, sys_scope>();
    put_signal<signal_add>(
        two_level.wire, remote_at<std::byte>(two_level, two_level.layout.windows.mailbox(there, parity)),
        remote_at<std::byte>(two_level, two_level.layout.mailbox_out(rail, parity)), 8 * posted,
        remote_at<uint64_t>(two_level, two_level.layout.windows.mailbox_signal(there, parity)), 1,
        rails.peer[rail]);
  }
}

/// Block 0: what sources of other domains have posted to this rank, their gateway, to its neighbours. A warp a
/// source. Those that wait for what has not come learn it by their own deadlines.
DEEPEP_DEVICE void relay_metadata(const TwoLevelDispatchCall& call) {
  using namespace dev;
  if (!is_leader_block()) return;
  const DispatchArgs& args = call.args.dispatch;
  const TwoLevelArgs& two_level = call.two_level;
  const Rails& rails = two_level.rails;
  const Group& g = call.near.g;
  const layout::MailboxWords words{call.all.num_ranks};
  SharedArray<uint32_t> failed(MetadataShared{g.num_ranks}.failed());
  const layout::WindowTurn turn{static_cast<int64_t>(load(&two_level.state->dispatches))};
  const int experts = num_expert_words(args);
  const int per_peer = words.expert_count(experts);
  for (int i = warp(); i < rails.num_in; i += num_warps()) {
    const int rail = rails.in[i];
    const int source = rails.peer[rail];
    const uint64_t* raised =
        remote_at<uint64_t>(two_level, two_level.layout.windows.mailbox_signal(rail, turn.half()));
    bool came = true;
    if (lane() == 0) {
      const auto wanted = static_cast<uint32_t>(turn.arrivals());
      came = wait_signal<acquire, sys_scope>(raised, wanted, call.near.deadline);
      if (!came) {
        note_late(g, Phase::kCounts, source, wanted, raised);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      }
    }
    sync_warp();  // lane 0's acquire comes before what the warp reads
    if (ballot(!came) != 0) continue;
    // What the source knew when it posted goes along to those who read these words.
    fence<acq_rel, sys_scope>();
    const auto* posted = remote_at<uint64_t>(two_level, two_level.layout.windows.mailbox(rail, turn.half()));
    for (int j = lane(); j < per_peer * g.num_ranks; j += kWarpSize) {
      const int local = j / per_peer;
      const int word = j % per_peer;
      if (!is_live(g, local)) continue;
      const int from = word < words.expert_count(0) ? word : word + local * experts;
      const auto value = static_cast<uint32_t>(load(posted + from));
      store<relaxed, sys_scope>(at<uint64_t>(g, local, g.control.mailbox(source, call.near.epoch) + 8 * word),
                                pack_tagged(value, call.near.epoch));
    }
  }
}

}  // namespace deepep::kernels
