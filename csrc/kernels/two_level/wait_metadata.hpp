// What the metadata of all ranks comes to: in one level each block keeps the table of all counts, here sums of
// its columns, so that ranks may be many. What needs the table reads the mailboxes again, which stand until the
// next call but one.
#pragma once

#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::kernels {

/// A word that `source` has posted to this rank, in its own heap.
[[nodiscard]] DEEPEP_DEVICE uint64_t* metadata_at(const TwoLevelDispatchCall& call, int source, int word) {
  const Group& g = call.near.g;
  return at<uint64_t>(g, g.rank, g.control.mailbox(source, call.near.epoch) + 8 * word);
}

/// Rows from each rank to each, behind wait_metadata, which has found them: of a call that is not cached.
[[nodiscard]] DEEPEP_DEVICE int32_t posted_count(const TwoLevelDispatchCall& call, int source, int to) {
  using namespace dev;
  if (!is_live(call.all, source)) return 0;
  const uint64_t word = load<relaxed, sys_scope>(metadata_at(call, source, to));
  return static_cast<int32_t>(unpack_tagged(word).value);
}

/// A word of a source's into shared memory; `count`: rows, if it is a count.
DEEPEP_DEVICE void keep_word(const TwoLevelDispatchCall& call, int source, int word, uint32_t value,
                             int32_t count) {
  using namespace dev;
  const int ranks = call.all.num_ranks;
  const layout::MailboxWords words{ranks};
  const TwoLevelDispatchShared shared = shared_of(call.args);
  if (word < ranks) {
    if (source == call.all.rank) SharedArray<int32_t>(shared.sends()).set(word, count);
    if (count == 0) return;
    if (source < call.all.rank) SharedArray<int32_t>(shared.first_rows()).add(word, count);
    SharedArray<int32_t>(shared.rows()).add(word, count);
    return;
  }
  if (word == words.slot(layout::kSlotRows)) SharedArray<uint32_t>(shared.tokens()).set(source, value);
  if (word == words.capacity()) SharedArray<uint32_t>(shared.capacities()).set(source, value);
  const int local = source - call.all.first_neighbour;
  if (local < 0 || local >= call.near.g.num_ranks) return;
  const MetadataShared near{call.near.g.num_ranks};
  if (word < words.slot(layout::kSlotArrays))
    SharedArray<uint32_t>(near.slot()).set(local * layout::kSlotArrays + word - words.slot(0), value);
  if (word == words.push_blocks()) SharedArray<uint32_t>(near.push_blocks()).set(local, value);
}

/// As in one level: every live rank's words into shared memory. 0 if they came, ranks agree and all rows fit;
/// else the Phases of why not, as bits. The same on all threads. Whole block; a fault is noted.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE uint32_t wait_metadata(const TwoLevelDispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const Group& g = call.near.g;
  const int ranks = call.all.num_ranks;
  const layout::MailboxWords words{ranks};
  const MetadataShared near{g.num_ranks};
  SharedArray<uint32_t> failed(near.failed());
  SharedArray<uint32_t> recv_failed(near.recv_failed());
  const int per_source = words.expert_count(0);
  const uint32_t own_digest = args.common_words[words.digest() - ranks];
  for (int i = thread(); i < ranks * per_source; i += num_threads()) {
    const int source = i / per_source;
    const int word = i % per_source;
    int32_t kept = 0;  // loaded before the wait
    if (kCached && word < ranks) kept = load_once(args.counts + source * ranks + word);
    uint32_t value = 0;
    if (is_live(call.all, source)) {
      const uint64_t* p = metadata_at(call, source, word);
      if (!wait_tag<acquire, sys_scope>(p, call.near.epoch, call.near.deadline, value)) {
        note_rank(g, Phase::kCounts, source, call.near.epoch, unpack_tagged(load<relaxed, sys_scope>(p)).tag);
        recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      } else if (word == words.digest() && (value != own_digest || own_digest == kRefusal)) {
        note_rank(g, Phase::kDisagreement, source, own_digest, value);
        recv_failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    keep_word(call, source, word, value, kCached ? kept : static_cast<int32_t>(value));
  }
  sync_block();
  uint32_t why = recv_failed.get(0);
  if (why == 0) {
    // Every warp comes to the same, without another barrier.
    const TwoLevelDispatchShared shared = shared_of(call.args);
    SharedArray<int32_t> rows(shared.rows());
    SharedArray<uint32_t> capacities(shared.capacities());
    bool too_many = false;
    for (int r = lane(); r < ranks; r += kWarpSize) {
      if (!is_live(call.all, r) || static_cast<uint32_t>(rows.get(r)) <= capacities.get(r)) continue;
      too_many = true;
      if (block() == 0 && warp() == 0 && args.host == nullptr)
        note_rank(g, Phase::kTooManyRows, r, capacities.get(r), static_cast<uint32_t>(rows.get(r)));
    }
    if (ballot(too_many) != 0) why = static_cast<uint32_t>(Phase::kTooManyRows);
  }
  if (why != 0 && lane() == 0) failed.bit_or(0, why);
  return why;
}

}  // namespace deepep::kernels
