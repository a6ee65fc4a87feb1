// How ranks agree on a dispatch before a row moves: words from every rank to every rank, and some to the host.
//
//   tell        block 0 sends each rank this rank's counts and what it lends (tagged words: one hop, no flag)
//   hear        every block waits for all ranks' words; they fix every row of every rank
//   tell_host   one block says how many rows come, while they travel
//
// Why no opening barrier is needed: a peer writes only into the slot it was told of in this call, and the slot is
// lent in stream order after its earlier readers. Why the mailbox may be written again: a peer that is one call ahead
// writes the other of two, and it gets two calls ahead only on our words of the next call, which we send when this
// kernel has ended.
#pragma once

#include "layout/counts.hpp"
#include "kernels/common/group.hpp"

namespace deepep::kernels {

/// What a block has heard, at the start of its dynamic shared memory.
struct ExchangeShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t slot() const {                // uint32 [R, kSlotArrays], units of 16 bytes
    return layout::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t capacity() const {  // uint32 [R]
    return slot() + layout::kSlotArrays * per_rank();
  }
  [[nodiscard]] DEEPEP_HD int64_t push_blocks() const { return capacity() + per_rank(); }  // uint32 [R]
  [[nodiscard]] DEEPEP_HD int64_t failed() const { return push_blocks() + per_rank(); }    // uint32: bits of Phases
  /// uint32: bits of those Phases that kept the words from being heard; nobody adds to it afterwards.
  [[nodiscard]] DEEPEP_HD int64_t unheard() const { return failed() + 4; }
  [[nodiscard]] DEEPEP_HD int64_t untold() const { return failed() + 8; }  // uint32: the same of the words for the host
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return failed() + 16; }

 private:
  [[nodiscard]] DEEPEP_HD int64_t per_rank() const { return layout::align_up(4 * static_cast<int64_t>(num_ranks), 16); }
};

/// What ranks must pass alike, in one word; 0 is kept for a rank that refuses.
[[nodiscard]] DEEPEP_HD uint32_t digest_of_call(const DispatchArgs& args) {
  if (args.refused) return 0;
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(static_cast<uint32_t>(args.num_scales));
  digest.add(static_cast<uint32_t>(args.index_bytes));
  digest.add(static_cast<uint32_t>(args.num_local_experts));
  digest.add(args.group.live);
  digest.add(args.cached ? 1u : 0u);
  digest.add(args.host != nullptr ? 1u : 0u);
  digest.add(args.tokens_per_expert != nullptr ? 1u : 0u);
  return digest.value | 1u;
}

/// Before a launch, by the host: what follows from the rest.
inline void prepare(DispatchArgs& args) {
  args.push_split = {args.num_tokens, layout::max_of(args.push_blocks, 1)};
  args.local_split = {args.num_tokens, layout::max_of(args.local_blocks, 1)};
  const layout::MailboxWords words{0};
  for (int i = 0; i < layout::kSlotArrays; ++i) args.common_words[words.slot(i)] = static_cast<uint32_t>(args.slot[i] / 16);
  args.common_words[words.capacity()] = static_cast<uint32_t>(args.slot_capacity);
  args.common_words[words.push_blocks()] = static_cast<uint32_t>(args.push_blocks);
  args.common_words[words.digest()] = digest_of_call(args);
}

/// tell: counts, what is lent and shapes to every live rank, this one included. One lane per word.
template <bool kCached>
DEEPEP_DEVICE void tell(const DispatchArgs& args, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
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
    else if (!kCached && !args.refused && is_live(g, word))  // a cached call's counts are in everybody's handle
      value = static_cast<uint32_t>(load_once(args.tokens_per_rank + word));
    // Relaxed: the word says all it has to, and carries the epoch, so that one of an earlier call is never taken for
    // this one's. What read the slot before were kernels that have ended: no write can reach them any more.
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, g.control.mailbox(g.rank, epoch) + 8 * word),
                              pack_tagged(value, epoch));
  }
}

/// Words of each source that every block needs, one thread each.
[[nodiscard]] DEEPEP_DEVICE int words_heard(const DispatchArgs& args) {
  return layout::MailboxWords{args.group.num_ranks}.expert_count(0);
}

/// The first warps of a block, those that wait in `hear`.
[[nodiscard]] DEEPEP_DEVICE int listening_warps(const DispatchArgs& args) {
  return (args.group.num_ranks * words_heard(args) + dev::kWarpSize - 1) / dev::kWarpSize;
}

/// hear: every live rank's words into shared memory. 0 if they came, ranks agree and all rows fit; else the Phases
/// of why not, as bits. The same on all threads. Whole block, with one barrier; a fault is noted.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE uint32_t hear(const DispatchArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  const layout::MailboxWords words{ranks};
  const ExchangeShared shared{ranks};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> slot(shared.slot());
  SharedArray<uint32_t> capacity(shared.capacity());
  SharedArray<uint32_t> push_blocks(shared.push_blocks());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> unheard(shared.unheard());

  const int per_source = words_heard(args);
  const uint32_t own_digest = args.common_words[words.digest() - ranks];
  for (int i = thread(); i < ranks * per_source; i += num_threads()) {
    const int source = i / per_source;
    const int word = i % per_source;
    int32_t kept = 0;  // asked for before the wait
    if (kCached && word < ranks) kept = load_once(args.counts + source * ranks + word);
    uint32_t value = 0;
    if (is_live(g, source)) {
      const uint64_t* p = at<uint64_t>(g, g.rank, g.control.mailbox(source, epoch) + 8 * word);
      if (!wait_tag<acquire, sys_scope>(p, epoch, deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << source, epoch, unpack_tagged(load<relaxed, sys_scope>(p)).tag);
        unheard.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      } else if (word == words.digest() && (value != own_digest || args.refused)) {
        note_fault(g, Phase::kDisagreement, 1u << source, own_digest, value);
        unheard.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    if (word < ranks) counts.set(source * ranks + word, kCached ? kept : static_cast<int32_t>(value));
    if (word >= words.slot(0) && word < words.slot(layout::kSlotArrays))
      slot.set(source * layout::kSlotArrays + word - words.slot(0), value);
    if (word == words.capacity()) capacity.set(source, value);
    if (word == words.push_blocks()) push_blocks.set(source, value);
  }
  sync_block();
  uint32_t why = unheard.get(0);
  if (why == 0) {
    // Every warp comes to the same, without another barrier: lane d sees whether what goes to rank d fits there.
    // Every rank sees every capacity, so all of them stop here, before a row has moved.
    // A host that waits hears it with the counts and lends a larger slot; for another it is a fault.
    const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };
    const bool asks = lane() < ranks && is_live(g, lane());
    const int64_t rows = asks ? layout::first_row_of_source(count, ranks, lane()) : 0;
    const bool too_many = asks && rows > capacity.get(lane());
    if (too_many && block() == 0 && warp() == 0 && args.host == nullptr)
      note_fault(g, Phase::kTooManyRows, 1u << lane(), capacity.get(lane()), static_cast<uint32_t>(rows));
    if (ballot(too_many) != 0) why = static_cast<uint32_t>(Phase::kTooManyRows);
  }
  if (why != 0 && lane() == 0) failed.bit_or(0, why);
  return why;
}

/// Tells the host how many rows come and for which experts, or with `why` that they do not; one block, all threads.
/// Tagged words, so that no word waits for another.
DEEPEP_DEVICE void tell_host(const DispatchArgs& args, uint32_t why, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const layout::MailboxWords words{g.num_ranks};
  const ExchangeShared shared{g.num_ranks};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> untold(shared.untold());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const auto tell = [&](uint64_t* word, int64_t value) {
    store<relaxed, sys_scope>(word, pack_tagged(static_cast<uint32_t>(value), args.ticket));
  };
  for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
    uint32_t total = 0;
    for (int s = 0; s < g.num_ranks && why == 0 && args.tokens_per_expert != nullptr; ++s) {
      uint32_t value = 0;
      if (!is_live(g, s)) continue;
      const int64_t offset = g.control.mailbox(s, epoch) + 8 * words.expert_count(l);
      if (!wait_tag<acquire, sys_scope>(at<uint64_t>(g, g.rank, offset), epoch, deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << s, epoch, value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
        untold.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      }
      total += value;
    }
    tell(&args.host->lists[g.num_ranks * g.num_ranks + l], total);
  }
  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads()) tell(&args.host->lists[i], counts.get(i));
  sync_block();
  if (thread() != 0) return;
  int64_t most = 0;
  for (int d = 0; d < g.num_ranks; ++d) {
    const int64_t rows = layout::first_row_of_source(count, g.num_ranks, d);
    most = rows > most ? rows : most;
  }
  tell(&args.host->num_rows, layout::first_row_of_source(count, g.num_ranks, g.rank));
  tell(&args.host->max_rows, most);
  tell(&args.host->num_returned, layout::first_staging_row(count, g.rank, g.num_ranks));
  tell(&args.host->phase, why | untold.get(0));
}

/// The counts of all ranks into the handle, for combine and cached dispatches. One block.
DEEPEP_DEVICE void keep_counts(const DispatchArgs& args) {
  const int ranks = args.group.num_ranks;
  dev::SharedArray<int32_t> counts(ExchangeShared{ranks}.counts());
  for (int i = dev::thread(); i < ranks * ranks; i += dev::num_threads()) dev::store(args.counts + i, counts.get(i));
}

/// An array that rank `d` lends, as this rank writes it; null if `d` does not want it.
template <class T>
[[nodiscard]] DEEPEP_DEVICE T* lent(const DispatchArgs& args, int d, layout::SlotArray array) {
  dev::SharedArray<uint32_t> slot(ExchangeShared{args.group.num_ranks}.slot());
  const uint32_t at = slot.get(d * layout::kSlotArrays + array);
  return at == 0 ? nullptr : reinterpret_cast<T*>(args.group.heap[d] + 16 * static_cast<int64_t>(at));
}

}  // namespace deepep::kernels
