// Agreement of all ranks on a dispatch before a row moves: words from every rank to every rank. They fix every
// row of every rank.
//
// Why no opening barrier is needed: a peer writes only into the arrays that were posted to it in this call, and
// they are granted in stream order after their earlier readers. Why the mailbox may be written again: a peer
// that is one call ahead writes the other of two, and it gets two calls ahead only on our words of the next
// call, which we post when this kernel has ended.
#pragma once

#include "kernels/common/waits.hpp"
#include "kernels/dispatch/count.hpp"

namespace deepep::kernels {

/// Whether experts' counts go round; with top-k, if hosts wait, about which they agree by themselves.
[[nodiscard]] DEEPEP_HD bool has_expert_counts(const DispatchArgs& args) {
  return finds_ranks(args.mode) || args.tokens_per_expert != nullptr;
}

/// The digest of what all ranks must pass alike.
[[nodiscard]] DEEPEP_HD uint32_t digest_of(const DispatchArgs& args) {
  if (args.mode == DispatchMode::kRefused) return kRefusal;
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(static_cast<uint32_t>(args.num_scales));
  digest.add(args.payload);
  digest.add(static_cast<uint32_t>(args.index_bytes));
  digest.add(static_cast<uint32_t>(args.num_local_experts));
  digest.add(args.group.live);
  digest.add(args.mode == DispatchMode::kCached ? 1u : args.mode == DispatchMode::kExpanded ? 2u : 0u);
  digest.add(args.host != nullptr ? 1u : 0u);
  digest.add(has_expert_counts(args) ? 1u : 0u);
  return digest.value | 1u;
}

/// Before a launch, by the host: what follows from the rest.
inline void prepare(DispatchArgs& args, int num_blocks, int num_warps) {
  args.push_split = {args.num_tokens, layout::max_of(args.push_blocks, 1)};
  args.local_split = {args.num_tokens, layout::max_of(args.local_blocks, 1)};
  args.groups = {args.num_tokens, num_blocks, num_warps, args.alone_tokens};
  args.experts_per_rank = layout::Divisor(layout::max_of(args.num_local_experts, 1));
  const layout::MailboxWords words{0};
  for (int i = 0; i < layout::kSlotArrays; ++i)
    args.common_words[words.slot(i)] = static_cast<uint32_t>(args.slot[i] / 16);
  args.common_words[words.capacity()] = static_cast<uint32_t>(args.slot_capacity);
  args.common_words[words.push_blocks()] = static_cast<uint32_t>(args.push_blocks);
  args.common_words[words.stream_tokens()] = 0;
  if (args.mode == DispatchMode::kExpanded && args.push_blocks > 0)
    args.common_words[words.stream_tokens()] = static_cast<uint32_t>(
        layout::ceil_div(layout::ceil_div(args.num_tokens, args.push_blocks), num_warps - 1));
  args.common_words[words.digest()] = digest_of(args);
}

/// Block 0: counts, receive arrays and shapes to every live rank, this one included. One lane per word. By
/// top-k, counts are in shared memory, and nothing is posted where they could not be found out; the experts'
/// follow.
template <DispatchMode kMode>
DEEPEP_DEVICE void post_metadata(const DispatchCall& call) {
  using namespace dev;
  if (!is_leader_block()) return;
  enter(call.lines, Step::kPost);
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  constexpr bool kCached = kMode == DispatchMode::kCached;
  constexpr bool kTopk = finds_ranks(kMode);
  if (kTopk && !sum_stretches(call)) return;
  const CountingShared counted{g.num_ranks};
  SharedArray<int32_t> totals(counted.totals());
  const layout::MailboxWords words{g.num_ranks};
  const int experts = !kCached && args.tokens_per_expert != nullptr ? args.num_local_experts : 0;
  const int per_peer = words.expert_count(experts);
  for (int i = thread(); i < per_peer * g.num_ranks; i += num_threads()) {
    const int peer = i / per_peer;
    const int word = i % per_peer;
    if (!is_live(g, peer)) continue;
    uint32_t value = 0;
    if (!kCached && word >= words.expert_count(0))
      value = static_cast<uint32_t>(
          load_once(args.tokens_per_expert + peer * args.num_local_experts + word - words.expert_count(0)));
    else if (word >= g.num_ranks)
      value = args.common_words[word - g.num_ranks];
    else if (kTopk && is_live(g, word))
      value = static_cast<uint32_t>(totals.get(word));
    else if (kMode == DispatchMode::kFresh && is_live(g, word))  // a cached call's are in everybody's handle
      value = static_cast<uint32_t>(load_once(args.tokens_per_rank + word));
    // Relaxed: the word needs no other, and carries the epoch, so that one of an earlier call is never taken
    // for this one's. What read the slot before were kernels that have ended: no write can reach them any more.
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, g.control.mailbox(g.rank, call.epoch) + 8 * word),
                              pack_tagged(value, call.epoch));
  }
}

/// A block's dynamic shared memory.
[[nodiscard]] inline int64_t shared_bytes(const DispatchArgs& args, int num_warps) {
  if (args.mode == DispatchMode::kTopk)
    return CountingShared{args.group.num_ranks}.bytes(args.groups.num_stretches);
  if (args.mode == DispatchMode::kExpanded) return NumberingShared::of(args, num_warps).bytes();
  return DispatchShared{args.group.num_ranks, num_warps}.bytes();
}

/// Words of each source that every block polls, one thread each.
[[nodiscard]] DEEPEP_DEVICE int num_metadata_words(const DispatchArgs& args) {
  return layout::MailboxWords{args.group.num_ranks}.expert_count(0);
}

/// The first warps of a block, those that poll in wait_metadata.
[[nodiscard]] DEEPEP_DEVICE int polling_warps(const DispatchArgs& args) {
  return (args.group.num_ranks * num_metadata_words(args) + dev::kWarpSize - 1) / dev::kWarpSize;
}

/// Where that is measured: how long other ranks' metadata is waited for, by one warp that polls it afterwards.
DEEPEP_DEVICE void measure_metadata(const DispatchCall& call) {
  using namespace dev;
  const Group& g = call.g;
  if (g.waits == nullptr || warp() != 0 || block() != num_blocks() - 1) return;
  const int64_t digest = int64_t{8} * layout::MailboxWords{g.num_ranks}.digest();
  measure_wait(sums_of(g, Waited::kMetadata), has_peer(g), call.deadline, [&] {
    const uint64_t* word = at<uint64_t>(g, g.rank, g.control.mailbox(lane(), call.epoch) + digest);
    return unpack_tagged(load<relaxed, sys_scope>(word)).tag == call.epoch;
  });
}

/// Every live rank's words into shared memory. 0 if they came, ranks agree and all rows fit; else the Phases of
/// why not, as bits: ranks never agree where one refuses. The same on all threads. Whole block, with one
/// barrier; a fault is noted.
template <DispatchMode kMode>
[[nodiscard]] DEEPEP_DEVICE uint32_t wait_metadata(const DispatchCall& call) {
  using namespace dev;
  constexpr bool kCached = kMode == DispatchMode::kCached;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  const int ranks = g.num_ranks;
  const layout::MailboxWords words{ranks};
  const MetadataShared shared{ranks};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> slot(shared.slot());
  SharedArray<uint32_t> capacity(shared.capacity());
  SharedArray<uint32_t> push_blocks(shared.push_blocks());
  SharedArray<uint32_t> stream_tokens(shared.stream_tokens());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> recv_failed(shared.recv_failed());

  enter(call.lines, Step::kWaitMetadata);
  measure_metadata(call);
  const int per_source = num_metadata_words(args);
  const uint32_t own_digest = args.common_words[words.digest() - ranks];
  for (int i = thread(); i < ranks * per_source; i += num_threads()) {
    const int source = i / per_source;
    const int word = i % per_source;
    int32_t kept = 0;  // loaded before the wait
    if (kCached && word < ranks) kept = load_once(args.counts + source * ranks + word);
    uint32_t value = 0;
    if (is_live(g, source)) {
      const uint64_t* p = at<uint64_t>(g, g.rank, g.control.mailbox(source, call.epoch) + 8 * word);
      if (!wait_tag<acquire, sys_scope>(p, call.epoch, call.deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << source, call.epoch, unpack_tagged(load<relaxed, sys_scope>(p)).tag);
        recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      } else if (word == words.digest() && (value != own_digest || own_digest == kRefusal)) {
        note_fault(g, Phase::kDisagreement, 1u << source, own_digest, value);
        recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    if (word < ranks) counts.set(source * ranks + word, kCached ? kept : static_cast<int32_t>(value));
    if (word >= words.slot(0) && word < words.slot(layout::kSlotArrays))
      slot.set(source * layout::kSlotArrays + word - words.slot(0), value);
    if (word == words.capacity()) capacity.set(source, value);
    if (word == words.push_blocks()) push_blocks.set(source, value);
    if (word == words.stream_tokens()) stream_tokens.set(source, value);
  }
  sync_block();
  uint32_t why = recv_failed.get(0);
  if (why == 0) {
    // Every warp comes to the same, without another barrier: lane d sees whether what goes to rank d fits
    // there. Every rank sees every capacity, so all of them stop here, before a row has moved. A host that
    // waits learns it with the counts and provides longer arrays; for another it is a fault.
    const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };
    const bool handles = lane() < ranks && is_live(g, lane());
    const int64_t rows = handles ? layout::first_row_of_source(count, ranks, lane()) : 0;
    const bool too_many = handles && rows > capacity.get(lane());
    if (too_many && block() == 0 && warp() == 0 && args.host == nullptr)
      note_fault(g, Phase::kTooManyRows, 1u << lane(), capacity.get(lane()), static_cast<uint32_t>(rows));
    if (ballot(too_many) != 0) why = static_cast<uint32_t>(Phase::kTooManyRows);
  }
  if (why != 0 && lane() == 0) failed.bit_or(0, why);
  return why;
}

/// An array in which rank `d` receives, as this rank writes it; null if `d` does not want it.
template <class T>
[[nodiscard]] DEEPEP_DEVICE T* recv_array(const DispatchArgs& args, int d, layout::SlotArray array) {
  dev::SharedArray<uint32_t> slot(MetadataShared{args.group.num_ranks}.slot());
  const uint32_t at = slot.get(d * layout::kSlotArrays + array);
  return at == 0 ? nullptr : reinterpret_cast<T*>(args.group.heap[d] + 16 * static_cast<int64_t>(at));
}

}  // namespace deepep::kernels
