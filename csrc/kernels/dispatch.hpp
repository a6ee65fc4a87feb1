// High-throughput dispatch: every row goes straight to its final place at its receiver.
//
//   tell      block 0 sends each rank this rank's counts and the slot it lends (tagged words: one hop, no flag)
//   place     meanwhile every block works out which rows of its tokens' receivers are theirs
//   hear      every block waits for all ranks' words; they fix every row of every rank
//   write     push blocks write rows that leave the rank, local blocks those that stay
//   publish   each push block raises its flag at each peer, after its rows
//   arrive    the last block waits for the flags of all peers' push blocks; the kernel's end publishes the rest
//
// Why no opening barrier is needed: a peer writes only into the slot it was told of in this call, and the
// slot is lent in stream order after its earlier readers. Why the mailbox may be written again: a peer that is
// one call ahead writes the other of two, and it gets two calls ahead only on our words of the next call, which
// we send when this kernel has ended.
#pragma once

#include "core/counts.hpp"
#include "kernels/group.hpp"

namespace deepep::kernels {

inline constexpr int kDispatchThreads = 512;
inline constexpr int kPlaceBatch = 8;  // tokens a thread looks at together
inline constexpr int kUnroll = 14;  // 16-byte accesses a lane has in flight: 7 KiB of a row a warp

/// The block's dynamic shared memory.
struct DispatchShared {
  int num_ranks;
  int warps;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t warp_counts() const {         // int32 [warps, R]
    return core::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t position() const {  // int32 [R]
    return warp_counts() + core::align_up(4 * static_cast<int64_t>(warps) * num_ranks, 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t slot() const {  // uint32 [R], units of 16 bytes
    return position() + core::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t capacity() const {  // uint32 [R]
    return slot() + core::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t push_blocks() const {  // uint32 [R]
    return capacity() + core::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t failed() const {  // uint32
    return push_blocks() + core::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return failed() + 16; }
};

/// What ranks must pass alike, in one word; 0 is kept for a rank that refuses.
[[nodiscard]] DEEPEP_DEVICE uint32_t signature_of(const DispatchArgs& args) {
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

/// Which ranks the block's tokens go to concern it: those it pushes to, itself, or both.
struct DispatchRole {
  bool push;
  bool local;
  int64_t begin;  // tokens [begin, end)
  int64_t end;
};

/// The ranks whose rows the role writes, as bits.
[[nodiscard]] DEEPEP_DEVICE uint32_t wanted_ranks(const DispatchRole& role, const Group& g) {
  const uint32_t self = 1u << g.rank;
  return g.live & ((role.local ? self : 0u) | (role.push ? ~self : 0u));
}

/// tell: counts, slot and shapes to every live rank, this one included. One lane per word.
DEEPEP_DEVICE void tell(const DispatchArgs& args, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  const core::MailboxWords words{g.num_ranks};
  const int experts = args.tokens_per_expert != nullptr ? args.num_local_experts : 0;
  const int per_peer = words.expert_count(experts);
  for (int i = thread(); i < per_peer * g.num_ranks; i += num_threads()) {
    const int peer = i / per_peer;
    const int word = i % per_peer;
    if (!is_live(g, peer)) continue;
    uint32_t value;
    if (word < g.num_ranks)  // a cached call's counts are in everybody's handle
      value = args.refused || args.cached || !is_live(g, word)
                  ? 0u
                  : static_cast<uint32_t>(load_once(args.tokens_per_rank + word));
    else if (word == words.slot())
      value = static_cast<uint32_t>(args.slot_offset / 16);
    else if (word == words.capacity())
      value = static_cast<uint32_t>(args.slot_capacity);
    else if (word == words.push_blocks())
      value = static_cast<uint32_t>(args.push_blocks);
    else if (word == words.signature())
      value = signature_of(args);
    else
      value = static_cast<uint32_t>(
          load_once(args.tokens_per_expert + peer * args.num_local_experts + word - words.expert_count(0)));
    // Relaxed: the word says all it has to, and carries the epoch, so that one of an earlier call is never taken for
    // this one's. What read the slot before were kernels that have ended: no write can reach them any more.
    store<relaxed, sys_scope>(at<uint64_t>(g, peer, g.control.mailbox(g.rank, epoch) + 8 * word),
                              pack_tagged(value, epoch));
  }
  lend_staging(g, load(&g.state->combine_epoch));
}

/// Bit r: token t goes to rank r, and that concerns the role (its bit is in `wanted`).
[[nodiscard]] DEEPEP_DEVICE uint32_t destinations_of(const DispatchArgs& args, int64_t t, uint32_t wanted) {
  const int ranks = args.group.num_ranks;
  uint32_t mask = 0;
  for (int r = 0; r < ranks; ++r)
    mask |= static_cast<uint32_t>(dev::load_once(args.is_token_in_rank + t * ranks + r) != 0) << r;
  return mask & wanted;
}

/// place: positions of the role's tokens among all of this rank's tokens for the same destination, left in
/// send_row (to which `write` adds the first row). Whole block.
DEEPEP_DEVICE void place(const DispatchArgs& args, const DispatchRole& role) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> warp_counts(shared.warp_counts());
  SharedArray<int32_t> position(shared.position());
  const uint32_t wanted = wanted_ranks(role, args.group);

  for (int r = thread(); r < ranks; r += num_threads()) position.set(r, 0);
  sync_block();
  int before_block = 0;  // of lane r: this warp's share of the earlier tokens that go to rank r
  for (int64_t first = thread(); first - thread() < role.begin; first += kPlaceBatch * num_threads()) {
    uint32_t goes[kPlaceBatch];  // all asked for before the first is looked at
#pragma unroll
    for (int i = 0; i < kPlaceBatch; ++i) {
      const int64_t t = first + i * num_threads();
      goes[i] = t < role.begin ? destinations_of(args, t, wanted) : 0;
    }
    for (int r = 0; r < ranks; ++r) {
      int with = 0;
#pragma unroll
      for (int i = 0; i < kPlaceBatch; ++i) with += popcount(ballot((goes[i] >> r) & 1u));
      if (lane() == r) before_block += with;
    }
  }
  if (lane() < ranks && before_block != 0) position.add(lane(), before_block);

  const uint32_t lanes_below = (1u << lane()) - 1u;
  for (int64_t first = role.begin; first < role.end; first += num_threads()) {
    const int64_t t = first + thread();
    const uint32_t goes = t < role.end ? destinations_of(args, t, wanted) : 0;
    for (int r = 0; r < ranks; ++r) {
      const uint32_t with = ballot((goes >> r) & 1u);
      if (lane() == r) warp_counts.set(warp() * ranks + r, popcount(with));
    }
    sync_block();
    // A thread a (warp, rank): the warp's tokens come after those of the warps before it.
    for (int r = warp(); r < ranks; r += num_warps()) {
      int total = 0;
      for (int first_warp = 0; first_warp < num_warps(); first_warp += kWarpSize) {
        const int w = first_warp + lane();
        const int count = w < num_warps() ? warp_counts.get(w * ranks + r) : 0;
        const int before = warp_exclusive_sum(count);
        if (w < num_warps()) warp_counts.set(w * ranks + r, position.get(r) + total + before);
        total += warp_sum(count);
      }
      sync_warp();
      if (lane() == 0) position.set(r, position.get(r) + total);
    }
    sync_block();
    for (int r = 0; r < ranks; ++r) {
      const bool go = (goes >> r) & 1u;
      const uint32_t with = ballot(go);
      if (t < role.end && ((wanted >> r) & 1u))
        store(args.send_row + t * ranks + r,
              go ? warp_counts.get(warp() * ranks + r) + popcount(with & lanes_below) : -1);
    }
    sync_block();
  }
}

/// hear: every live rank's words into shared memory. False, on all threads, if one did not come or ranks
/// disagree. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool hear(const DispatchArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  const core::MailboxWords words{ranks};
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> slot(shared.slot());
  SharedArray<uint32_t> capacity(shared.capacity());
  SharedArray<uint32_t> push_blocks(shared.push_blocks());
  SharedArray<uint32_t> failed(shared.failed());

  const int per_source = words.expert_count(0);
  for (int i = thread(); i < ranks * per_source; i += num_threads()) {
    const int source = i / per_source;
    const int word = i % per_source;
    uint32_t value = 0;
    if (is_live(g, source)) {
      const uint64_t* p = at<uint64_t>(g, g.rank, g.control.mailbox(source, epoch) + 8 * word);
      if (!wait_tag<acquire, sys_scope>(p, epoch, deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << source, epoch, unpack_tagged(load<relaxed, sys_scope>(p)).tag);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      } else if (word == words.signature() && (value != signature_of(args) || args.refused)) {
        note_fault(g, Phase::kDisagreement, 1u << source, signature_of(args), value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    if (word < ranks)
      counts.set(source * ranks + word,
                 args.cached ? load_once(args.counts + source * ranks + word) : static_cast<int32_t>(value));
    if (word == words.slot()) slot.set(source, value);
    if (word == words.capacity()) capacity.set(source, value);
    if (word == words.push_blocks()) push_blocks.set(source, value);
  }
  sync_block();
  const bool came = failed.get(0) == 0;
  sync_block();  // all have read it, before one that is ahead of the others sets it again
  if (!came) return false;
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };
  for (int d = thread(); d < ranks; d += num_threads()) {
    const int64_t rows = core::first_row_of_source(count, ranks, d);
    if (!is_live(g, d) || rows <= capacity.get(d)) continue;
    // Every rank sees every capacity, so all of them stop here, before a row has moved.
    // A host that waits hears it with the counts and lends a larger slot; for another it is a fault.
    if (block() == 0 && args.host == nullptr)
      note_fault(g, Phase::kTooManyRows, 1u << d, capacity.get(d), static_cast<uint32_t>(rows));
    failed.bit_or(0, static_cast<uint32_t>(Phase::kTooManyRows));
  }
  sync_block();
  const bool fits = failed.get(0) == 0;
  sync_block();
  return fits;
}

/// Tells the host how many rows come and for which experts; one block, all threads. Tagged words, so that no word
/// waits for another.
DEEPEP_DEVICE void tell_host(const DispatchArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const core::MailboxWords words{g.num_ranks};
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const auto tell = [&](uint64_t* word, int64_t value) {
    store<relaxed, sys_scope>(word, pack_tagged(static_cast<uint32_t>(value), args.ticket));
  };
  const bool heard = failed.get(0) == 0;
  sync_block();  // all have looked before one may fail below
  for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
    uint32_t total = 0;
    for (int s = 0; s < g.num_ranks && heard && args.tokens_per_expert != nullptr; ++s) {
      uint32_t value = 0;
      if (!is_live(g, s)) continue;
      const int64_t offset = g.control.mailbox(s, epoch) + 8 * words.expert_count(l);
      if (!wait_tag<acquire, sys_scope>(at<uint64_t>(g, g.rank, offset), epoch, deadline, value)) {
        note_fault(g, Phase::kCounts, 1u << s, epoch, value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      }
      total += value;
    }
    tell(&args.host->expert[l], total);
  }
  sync_block();
  if (thread() != 0) return;
  int64_t most = 0;
  for (int d = 0; d < g.num_ranks; ++d) {
    const int64_t rows = core::first_row_of_source(count, g.num_ranks, d);
    most = rows > most ? rows : most;
  }
  tell(&args.host->num_rows, core::first_row_of_source(count, g.num_ranks, g.rank));
  tell(&args.host->most_rows, most);
  tell(&args.host->returning, core::first_staging_row(count, g.rank, g.num_ranks));
  tell(&args.host->phase, failed.get(0));
}

/// The arrays of rank `d`'s slot, as this rank writes them.
struct Slot {
  std::byte* base;
  core::SlotLayout layout;
};

[[nodiscard]] DEEPEP_DEVICE Slot slot_of(const DispatchArgs& args, int d) {
  const DispatchShared shared{args.group.num_ranks, dev::num_warps()};
  dev::SharedArray<uint32_t> slot(shared.slot());
  dev::SharedArray<uint32_t> capacity(shared.capacity());
  return {args.group.heap[d] + 16 * static_cast<int64_t>(slot.get(d)),
          {static_cast<int64_t>(capacity.get(d)), args.row_bytes, args.num_scales, args.num_topk, args.index_bytes}};
}

/// What travels with a row besides its bytes, a piece in each lane's hands.
struct Metadata {
  static constexpr int kScales = 2;  // scales a lane holds; further ones are read when they are written
  uint32_t scale[kScales];
  int64_t entry;
  uint32_t weight;
};

[[nodiscard]] DEEPEP_DEVICE uint32_t scale_of(const DispatchArgs& args, int64_t t, int i) {
  return dev::load_once(args.scales + t * args.scale_token_stride + i * args.scale_stride);
}

/// Scales, top-k index and weight of token t, asked for before the row so that they arrive with it. One warp.
[[nodiscard]] DEEPEP_DEVICE Metadata read_metadata(const DispatchArgs& args, int64_t t) {
  using namespace dev;
  Metadata m{};
#pragma unroll
  for (int j = 0; j < Metadata::kScales; ++j) {
    const int i = lane() + j * kWarpSize;
    if (i < args.num_scales) m.scale[j] = scale_of(args, t, i);
  }
  if (lane() < args.num_topk) {
    const int64_t from = t * args.num_topk + lane();
    m.entry = args.index_bytes == 8 ? load_once(static_cast<const int64_t*>(args.topk_idx) + from)
                                    : load_once(static_cast<const int32_t*>(args.topk_idx) + from);
    m.weight = load_once(args.topk_weights + from);
  }
  return m;
}

/// The same to row `row` at rank d, as d sees them: its own experts' indices and weights, -1 and 0 for others'.
DEEPEP_DEVICE void write_metadata(const DispatchArgs& args, const Metadata& m, int64_t t, int d, int64_t row) {
  using namespace dev;
  const Slot slot = slot_of(args, d);
  if (lane() == 0) store(reinterpret_cast<int32_t*>(slot.base + slot.layout.source()) + row, static_cast<int32_t>(t));
  uint32_t* scales = reinterpret_cast<uint32_t*>(slot.base + slot.layout.scales()) + row * args.num_scales;
#pragma unroll
  for (int j = 0; j < Metadata::kScales; ++j) {
    const int i = lane() + j * kWarpSize;
    if (i < args.num_scales) store(scales + i, m.scale[j]);
  }
  for (int i = lane() + Metadata::kScales * kWarpSize; i < args.num_scales; i += kWarpSize)
    store(scales + i, scale_of(args, t, i));
  if (lane() >= args.num_topk) return;
  const core::Placement placement(args.num_local_experts * args.group.num_ranks, args.group.num_ranks,
                                  args.group.num_ranks);
  const int64_t to = row * args.num_topk + lane();
  const int32_t local = placement.local_expert(m.entry, d);
  std::byte* idx = slot.base + slot.layout.topk_idx();
  if (args.index_bytes == 8)
    store(reinterpret_cast<int64_t*>(idx) + to, static_cast<int64_t>(local));
  else
    store(reinterpret_cast<int32_t*>(idx) + to, local);
  store(reinterpret_cast<uint32_t*>(slot.base + slot.layout.topk_weights()) + to, local >= 0 ? m.weight : 0u);
}

/// Into how many parts a row is cut so that a few tokens still keep all warps busy: 1, 2 or 4.
[[nodiscard]] DEEPEP_DEVICE int parts_for(int64_t tokens, int64_t warps) {
  return tokens * 4 <= warps ? 4 : tokens * 2 <= warps ? 2 : 1;
}

/// Lane r: the position of item i's token at rank r, or -1 if it does not go there or that is not the role's to write.
[[nodiscard]] DEEPEP_DEVICE int32_t position_of_item(const DispatchArgs& args, const DispatchRole& role, int parts,
                                                     int64_t i) {
  const bool mine = i < (role.end - role.begin) * parts && ((wanted_ranks(role, args.group) >> dev::lane()) & 1u);
  return mine ? dev::load(args.send_row + (role.begin + i / parts) * args.group.num_ranks + dev::lane()) : -1;
}

/// write: a warp takes a token, or a part of one; a row is read once and stored to every destination of the role.
/// `first_position`: the warp's first item's, asked for while the counts travelled.
DEEPEP_DEVICE void write_rows(const DispatchArgs& args, const DispatchRole& role, int32_t first_position) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };

  // Lane r speaks for rank r.
  const bool mine = (wanted_ranks(role, g) >> lane()) & 1u;
  const int32_t first_row = mine ? static_cast<int32_t>(core::first_row_of_source(count, g.rank, lane())) : 0;
  const int32_t end_row = mine ? first_row + count(g.rank, lane()) : 0;
  const uint64_t slot_x = mine ? reinterpret_cast<uint64_t>(slot_of(args, lane()).base) : 0;
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int parts = parts_for(role.end - role.begin, num_warps());

  const int64_t items = (role.end - role.begin) * parts;
  int32_t next = first_position;  // asked for a token ahead
  for (int64_t i = warp(); i < items; i += num_warps()) {
    const int64_t t = role.begin + i / parts;
    const int part = static_cast<int>(i % parts);
    const int32_t position = next;
    next = position_of_item(args, role, parts, i + num_warps());
    const int32_t row = args.cached ? position : first_row + position;
    // More tokens for a rank than was told would run into another source's rows, or out of the slot.
    if (position >= 0 && row >= end_row)
      note_fault(g, Phase::kDisagreement, 1u << g.rank, static_cast<uint32_t>(end_row), static_cast<uint32_t>(row));
    const uint32_t destinations = ballot(position >= 0 && row < end_row);
    if (ballot(position >= 0 && row >= end_row) != 0 && lane() == 0)
      failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    if (destinations == 0) continue;
    Metadata metadata{};
    if (part == 0) metadata = read_metadata(args, t);
    const uint64_t target = slot_x + static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes);
    const Vec16* source = reinterpret_cast<const Vec16*>(args.x + t * args.row_bytes);
    const int end = chunks * (part + 1) / parts;
#pragma unroll 1
    for (int begin = chunks * part / parts + lane(); begin < end + lane(); begin += kUnroll * kWarpSize) {
      const int pieces = end - begin;  // this lane's are those u with u * kWarpSize < pieces
      Vec16 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (u * kWarpSize < pieces) v[u] = load_once(source + begin + u * kWarpSize);
#pragma unroll 1
      for (uint32_t left = destinations; left != 0; left &= left - 1) {
        Vec16* to = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(left))) + begin;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (u * kWarpSize < pieces) store_streaming(to + u * kWarpSize, v[u]);
      }
    }
    if (part != 0) continue;
    for (uint32_t left = destinations; left != 0; left &= left - 1) {
      const int d = lowest_bit(left);
      write_metadata(args, metadata, t, d, shuffle(row, d));
    }
  }
}

/// Positions become final rows, for the handle: once no warp reads the positions any more. Whole block.
DEEPEP_DEVICE void finish_rows(const DispatchArgs& args, const DispatchRole& role) {
  using namespace dev;
  const Group& g = args.group;
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const uint32_t wanted = wanted_ranks(role, g);
  for (int64_t i = thread(); i < (role.end - role.begin) * g.num_ranks; i += num_threads()) {
    const int r = static_cast<int>(i % g.num_ranks);
    int32_t* place = args.send_row + role.begin * g.num_ranks + i;
    if (!((wanted >> r) & 1u)) {
      if (!is_live(g, r) && role.push) store(place, -1);
      continue;
    }
    const int32_t position = load(place);
    if (position >= 0) store(place, position + static_cast<int32_t>(core::first_row_of_source(count, g.rank, r)));
  }
}

/// Rows past the last received one carry no expert: what `num_worst_tokens` promises. The local blocks' part.
DEEPEP_DEVICE void pad_indices(const DispatchArgs& args, int part, int parts) {
  using namespace dev;
  const Group& g = args.group;
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const int64_t received = core::first_row_of_source(count, g.num_ranks, g.rank);
  const Slot slot = slot_of(args, g.rank);
  std::byte* idx = slot.base + slot.layout.topk_idx();
  const int64_t end = args.num_worst_tokens * args.num_topk;
  for (int64_t i = received * args.num_topk + part * num_threads() + thread(); i < end; i += parts * num_threads()) {
    if (args.index_bytes == 8)
      store(reinterpret_cast<int64_t*>(idx) + i, static_cast<int64_t>(-1));
    else
      store(reinterpret_cast<int32_t*>(idx) + i, -1);
  }
}

/// publish: this push block's rows, the `flag`-th's, are at every peer. Its threads' stores come before its flags: the
/// block barrier orders them before the releasing thread, and the release carries them along.
DEEPEP_DEVICE void publish_rows(const Group& g, int flag, uint32_t epoch) {
  using namespace dev;
  sync_block();
  for (int d = thread(); d < g.num_ranks; d += num_threads()) {
    if (d == g.rank || !is_live(g, d)) continue;
    store<release, sys_scope>(at<uint32_t>(g, d, g.control.rows_done(g.rank)) + flag, epoch);
  }
}

/// arrive: waits for the flags of all peers' push blocks. One thread a flag, so no order among peers.
DEEPEP_DEVICE void await_rows(const Group& g, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<uint32_t> push_blocks(shared.push_blocks());
  SharedArray<uint32_t> failed(shared.failed());
  for (int source = warp(); source < g.num_ranks; source += num_warps()) {
    if (source == g.rank || !is_live(g, source)) continue;
    for (int flag = lane(); flag < static_cast<int>(push_blocks.get(source)); flag += kWarpSize) {
      const uint32_t* done = at<uint32_t>(g, g.rank, g.control.rows_done(source)) + flag;
      if (wait_equal<acquire, sys_scope>(done, epoch, deadline)) continue;
      note_fault(g, Phase::kRows, 1u << source, epoch, load<relaxed, sys_scope>(done));
      failed.bit_or(0, static_cast<uint32_t>(Phase::kRows));
    }
  }
}

/// Local blocks come first: block 0 talks, and has time to. The push blocks' flags are numbered from 0.
[[nodiscard]] DEEPEP_DEVICE int first_push_block(const DispatchArgs& args) {
  return dev::num_blocks() - args.push_blocks;
}

[[nodiscard]] DEEPEP_DEVICE DispatchRole role_of_block(const DispatchArgs& args) {
  DispatchRole role{dev::block() >= first_push_block(args), dev::block() < args.local_blocks, 0, 0};
  // Blocks of both roles share their tokens with all others: then the two counts are equal.
  const core::TokenSplit split{args.num_tokens, role.push ? args.push_blocks : args.local_blocks};
  const int part = role.push ? dev::block() - first_push_block(args) : dev::block();
  role.begin = split.begin(part);
  role.end = split.end(part);
  return role;
}

/// A dispatch that was given up leaves a handle that sends nothing anywhere: a combine queued behind it does no harm.
/// Each block its own part of it; block 0 the counts.
DEEPEP_DEVICE void leave_empty_handle(const DispatchArgs& args, const DispatchRole& role) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const uint32_t wanted = wanted_ranks(role, args.group) | (role.push ? ~args.group.live : 0u);
  for (int64_t i = thread(); i < (role.end - role.begin) * ranks; i += num_threads())
    if ((wanted >> (i % ranks)) & 1u) store(args.send_row + role.begin * ranks + i, -1);
  if (block() != 0) return;
  for (int i = thread(); i < ranks * ranks; i += num_threads()) store(args.counts + i, 0);
}

/// The counts of all ranks into the handle, for combine and cached dispatches.
DEEPEP_DEVICE void keep_counts(const DispatchArgs& args) {
  const int ranks = args.group.num_ranks;
  dev::SharedArray<int32_t> counts(DispatchShared{ranks, dev::num_warps()}.counts());
  for (int i = dev::thread(); i < ranks * ranks; i += dev::num_threads()) dev::store(args.counts + i, counts.get(i));
}

/// Asks for the first rows of the role's tokens while the counts travel.
DEEPEP_DEVICE void prefetch_rows(const DispatchArgs& args, const DispatchRole& role) {
  const int64_t lines = args.row_bytes / core::kLine;
  const int parts = parts_for(role.end - role.begin, dev::num_warps());
  const int64_t t = role.begin + dev::warp() / parts;
  if (t >= role.end) return;
  const int part = dev::warp() % parts;
  for (int64_t line = lines * part / parts + dev::lane(); line < lines * (part + 1) / parts; line += dev::kWarpSize)
    dev::prefetch(args.x + t * args.row_bytes + line * core::kLine);
}

DEEPEP_KERNEL(dispatch_kernel, DispatchArgs, kDispatchThreads) {
  using namespace dev;
  const Group& g = args.group;
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<uint32_t> failed(shared.failed());
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->dispatch_epoch);
  const DispatchRole role = role_of_block(args);
  const bool talks = block() == 0;
  const bool tells_host = args.host != nullptr && block() == (num_blocks() > 1 ? 1 : 0);

  if (thread() == 0) failed.set(0, 0);
  if (talks) tell(args, epoch);
  prefetch_rows(args, role);
  if (!args.cached && !args.refused) place(args, role);
  sync_block();
  if (thread() == num_threads() - 1) have_read_epoch(g, &g.state->dispatch_epoch, epoch);
  const int parts = parts_for(role.end - role.begin, num_warps());
  const int32_t first_position = args.refused ? -1 : position_of_item(args, role, parts, warp());
  const bool heard = hear(args, epoch, deadline);  // never, on a rank that refused: it disagrees with itself
  if (tells_host) tell_host(args, epoch, deadline);
  if (heard) {
    write_rows(args, role, first_position);
    if (role.push) publish_rows(g, block() - first_push_block(args), epoch);
    if (!args.cached) {
      sync_block();
      finish_rows(args, role);
      if (talks) keep_counts(args);
    }
    if (role.local && args.num_worst_tokens > 0) pad_indices(args, block(), args.local_blocks);
    if (block() == num_blocks() - 1) await_rows(g, epoch, deadline);
  } else if (!args.cached) {
    leave_empty_handle(args, role);
  }
  sync_block();
  if (thread() == 0 && failed.get(0) != 0) hand_over_faults(g, Operation::kDispatch);
}

}  // namespace deepep::kernels
