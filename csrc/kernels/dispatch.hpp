// High-throughput dispatch: every row goes straight to its final place at its receiver.
//
//   tell      block 0 sends each rank this rank's counts and the slot it lends (tagged words: one hop, no flag)
//   place     meanwhile every block works out which rows of its tokens' receivers are theirs
//   hear      every block waits for all ranks' words; they fix every row of every rank
//   write     push blocks write rows that leave the rank, local blocks those that stay
//   publish   each push block raises its flag at each peer, after its rows
//   arrive    block 0 waits for the flags of all peers' push blocks; the kernel's end publishes the rest
//
// Why no opening barrier is needed: a peer writes only into the slot it was told of in this call, and the
// slot is lent in stream order after its earlier readers. Why the mailbox may be written again: a peer that is
// one call ahead writes the other of two, and it gets two calls ahead only on our words of the next call, which
// we send when this kernel has ended.
#pragma once

#include "core/counts.hpp"
#include "kernels/group.hpp"

namespace deepep::kernels {

inline constexpr int kUnroll = 8;  // 16-byte accesses a lane has in flight

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
  [[nodiscard]] DEEPEP_HD int64_t failed() const {  // uint32
    return capacity() + core::align_up(4 * static_cast<int64_t>(num_ranks), 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return failed() + 16; }
};

/// What ranks must pass alike, in one word.
[[nodiscard]] DEEPEP_DEVICE uint32_t signature_of(const DispatchArgs& args) {
  uint32_t h = 2166136261u;
  const uint32_t parts[5] = {static_cast<uint32_t>(args.row_bytes), static_cast<uint32_t>(args.num_topk),
                             static_cast<uint32_t>(args.num_scales), static_cast<uint32_t>(args.index_bytes),
                             static_cast<uint32_t>(args.cached)};
  for (uint32_t part : parts) h = (h ^ part) * 16777619u;
  return h;
}

/// Which ranks the block's tokens go to concern it: those it pushes to, itself, or both.
struct DispatchRole {
  bool push;
  bool local;
  int64_t begin;  // tokens [begin, end)
  int64_t end;
};

[[nodiscard]] DEEPEP_DEVICE bool concerns(const DispatchRole& role, const Group& g, int rank) {
  return is_live(g, rank) && (rank == g.rank ? role.local : role.push);
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
    if (word < g.num_ranks)
      value = !is_live(g, word) ? 0u
              : args.cached     ? static_cast<uint32_t>(load_once(args.counts + g.rank * g.num_ranks + word))
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
    // Release: whatever read this rank's slot before (earlier kernels of this stream) comes before a peer's
    // writes to it. The tag carries the epoch, so a word of an earlier call is never taken for this one's.
    store<release, sys_scope>(at<uint64_t>(g, peer, g.control.mailbox(g.rank, epoch) + 8 * word),
                              pack_tagged(value, epoch));
  }
}

/// place: positions of the role's tokens among all of this rank's tokens for the same destination, left in
/// send_row (to which `write` adds the first row). Whole block.
DEEPEP_DEVICE void place(const DispatchArgs& args, const DispatchRole& role) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> warp_counts(shared.warp_counts());
  SharedArray<int32_t> position(shared.position());

  for (int r = thread(); r < ranks; r += num_threads()) position.set(r, 0);
  sync_block();
  for (int r = 0; r < ranks; ++r) {  // tokens before this block's
    if (!concerns(role, g, r)) continue;
    int mine = 0;
    for (int64_t t = thread(); t < role.begin; t += num_threads())
      mine += load_once(args.is_token_in_rank + t * ranks + r) != 0;
    mine = warp_sum(mine);
    if (lane() == 0 && mine != 0) position.add(r, mine);
  }
  const uint32_t lanes_below = (1u << lane()) - 1u;
  for (int64_t first = role.begin; first < role.end; first += num_threads()) {
    const int64_t t = first + thread();
    const bool inside = t < role.end;
    uint32_t goes = 0;  // bit r: this thread's token goes to rank r
    sync_block();
    for (int r = 0; r < ranks; ++r) {
      if (!concerns(role, g, r)) continue;
      const bool go = inside && load_once(args.is_token_in_rank + t * ranks + r) != 0;
      goes |= static_cast<uint32_t>(go) << r;
      const uint32_t with = ballot(go);
      if (lane() == 0) warp_counts.set(warp() * ranks + r, popcount(with));
    }
    sync_block();
    for (int r = 0; r < ranks; ++r) {
      if (!concerns(role, g, r)) continue;
      const bool go = (goes >> r) & 1u;
      const uint32_t with = ballot(go);
      int before = position.get(r);
      for (int w = 0; w < warp(); ++w) before += warp_counts.get(w * ranks + r);
      if (inside) store(args.send_row + t * ranks + r, go ? before + popcount(with & lanes_below) : -1);
    }
    sync_block();
    for (int r = thread(); r < ranks; r += num_threads()) {
      if (!concerns(role, g, r)) continue;
      int total = position.get(r);
      for (int w = 0; w < num_warps(); ++w) total += warp_counts.get(w * ranks + r);
      position.set(r, total);
    }
  }
  sync_block();
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
      } else if (word == words.signature() && value != signature_of(args)) {
        note_fault(g, Phase::kDisagreement, 1u << source, signature_of(args), value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    if (word < ranks) counts.set(source * ranks + word, static_cast<int32_t>(value));
    if (word == words.slot()) slot.set(source, value);
    if (word == words.capacity()) capacity.set(source, value);
  }
  sync_block();
  if (failed.get(0) != 0) return false;
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
  return failed.get(0) == 0;
}

/// Tells the host how many rows come and for which experts; block 0, all threads. The ticket goes last.
DEEPEP_DEVICE void tell_host(const DispatchArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const core::MailboxWords words{g.num_ranks};
  const DispatchShared shared{g.num_ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  if (args.tokens_per_expert != nullptr && failed.get(0) == 0) {
    for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
      uint32_t total = 0;
      for (int s = 0; s < g.num_ranks; ++s) {
        uint32_t value = 0;
        if (!is_live(g, s)) continue;
        const int64_t offset = g.control.mailbox(s, epoch) + 8 * words.expert_count(l);
        if (!wait_tag<acquire, sys_scope>(at<uint64_t>(g, g.rank, offset), epoch, deadline, value)) {
          note_fault(g, Phase::kCounts, 1u << s, epoch, value);
          failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
        }
        total += value;
      }
      store(&args.host->expert[l], total);
    }
  }
  sync_block();  // the expert counts come before the ticket
  if (thread() != 0) return;
  int64_t most = 0;
  for (int d = 0; d < g.num_ranks; ++d) {
    const int64_t rows = core::first_row_of_source(count, g.num_ranks, d);
    most = rows > most ? rows : most;
  }
  store(&args.host->num_rows, static_cast<uint32_t>(core::first_row_of_source(count, g.num_ranks, g.rank)));
  store(&args.host->most_rows, static_cast<uint32_t>(most));
  store(&args.host->phase, failed.get(0));
  store<release, sys_scope>(&args.host->ticket, args.ticket);
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

/// Source token, scales, top-k indices and weights of token t, for its row at rank d. One warp.
DEEPEP_DEVICE void write_metadata(const DispatchArgs& args, int64_t t, int d, int64_t row) {
  using namespace dev;
  const Slot slot = slot_of(args, d);
  if (lane() == 0) store(reinterpret_cast<int32_t*>(slot.base + slot.layout.source()) + row, static_cast<int32_t>(t));
  uint32_t* scales = reinterpret_cast<uint32_t*>(slot.base + slot.layout.scales()) + row * args.num_scales;
  for (int i = lane(); i < args.num_scales; i += kWarpSize)
    store(scales + i, load_once(args.scales + t * args.scale_token_stride + i * args.scale_stride));
  if (lane() >= args.num_topk) return;
  const core::Placement placement(args.num_local_experts * args.group.num_ranks, args.group.num_ranks,
                                  args.group.num_ranks);
  const int64_t from = t * args.num_topk + lane();
  const int64_t to = row * args.num_topk + lane();
  const int64_t entry = args.index_bytes == 8 ? load_once(static_cast<const int64_t*>(args.topk_idx) + from)
                                              : load_once(static_cast<const int32_t*>(args.topk_idx) + from);
  const int32_t local = placement.local_expert(entry, d);
  std::byte* idx = slot.base + slot.layout.topk_idx();
  if (args.index_bytes == 8)
    store(reinterpret_cast<int64_t*>(idx) + to, static_cast<int64_t>(local));
  else
    store(reinterpret_cast<int32_t*>(idx) + to, local);
  const uint32_t weight = local >= 0 ? load_once(args.topk_weights + from) : 0u;
  store(reinterpret_cast<uint32_t*>(slot.base + slot.layout.topk_weights()) + to, weight);
}

/// write: each warp takes whole tokens; a row is read once and stored to every destination of the role.
DEEPEP_DEVICE void write_rows(const DispatchArgs& args, const DispatchRole& role) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> counts(shared.counts());
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };

  // Lane r speaks for rank r.
  const bool mine = lane() < ranks && concerns(role, g, lane());
  const int32_t first_row =
      lane() < ranks ? static_cast<int32_t>(core::first_row_of_source(count, g.rank, lane())) : 0;
  const uint64_t slot_x = mine ? reinterpret_cast<uint64_t>(slot_of(args, lane()).base) : 0;
  const int64_t chunks = args.row_bytes / 16;

  for (int64_t t = role.begin + warp(); t < role.end; t += num_warps()) {
    int32_t row = -1;
    if (mine) {
      int32_t* place = args.send_row + t * ranks + lane();
      row = load(place);
      if (row >= 0 && !args.cached) {
        row += first_row;
        store(place, row);  // the handle keeps final rows
      }
    }
    const uint32_t destinations = ballot(row >= 0);
    if (destinations == 0) continue;
    const uint64_t target = slot_x + static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes);
    const Vec16* source = reinterpret_cast<const Vec16*>(args.x + t * args.row_bytes);
    for (int64_t begin = 0; begin < chunks; begin += kUnroll * kWarpSize) {
      Vec16 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t c = begin + u * kWarpSize + lane();
        if (c < chunks) v[u] = load_once(source + c);
      }
      for (uint32_t left = destinations; left != 0; left &= left - 1) {
        Vec16* to = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(left)));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t c = begin + u * kWarpSize + lane();
          if (c < chunks) store_streaming(to + c, v[u]);
        }
      }
    }
    for (uint32_t left = destinations; left != 0; left &= left - 1) {
      const int d = lowest_bit(left);
      write_metadata(args, t, d, shuffle(row, d));
    }
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

/// publish: this block's rows are at every peer. Its threads' stores come before its flags: the block barrier
/// orders them before the releasing thread, and the release carries them along.
DEEPEP_DEVICE void publish_rows(const Group& g, uint32_t epoch) {
  using namespace dev;
  sync_block();
  for (int d = thread(); d < g.num_ranks; d += num_threads()) {
    if (d == g.rank || !is_live(g, d)) continue;
    store<release, sys_scope>(at<uint32_t>(g, d, g.control.rows_done(g.rank)) + block(), epoch);
  }
}

/// arrive: waits for the flags of all peers' push blocks. One thread a flag, so no order among peers.
DEEPEP_DEVICE void await_rows(const DispatchArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const core::MailboxWords words{g.num_ranks};
  for (int i = thread(); i < g.num_ranks * g.control.max_blocks; i += num_threads()) {
    const int source = i / g.control.max_blocks;
    const int flag = i % g.control.max_blocks;
    if (source == g.rank || !is_live(g, source)) continue;
    uint32_t blocks = 0;
    const int64_t offset = g.control.mailbox(source, epoch) + 8 * words.push_blocks();
    if (!wait_tag<acquire, sys_scope>(at<uint64_t>(g, g.rank, offset), epoch, deadline, blocks) ||
        flag >= static_cast<int>(blocks))
      continue;  // a missing mailbox was noted by `hear`
    const uint32_t* done = at<uint32_t>(g, g.rank, g.control.rows_done(source)) + flag;
    if (!wait_equal<acquire, sys_scope>(done, epoch, deadline))
      note_fault(g, Phase::kRows, 1u << source, epoch, load<relaxed, sys_scope>(done));
  }
}

[[nodiscard]] DEEPEP_DEVICE DispatchRole role_of_block(const DispatchArgs& args) {
  const int first_local = dev::num_blocks() - args.local_blocks;
  DispatchRole role{dev::block() < args.push_blocks, dev::block() >= first_local, 0, 0};
  // A block of both roles shares its tokens with the others of both: then the two counts are equal.
  const core::TokenSplit split{args.num_tokens, role.push ? args.push_blocks : args.local_blocks};
  const int part = role.push ? dev::block() : dev::block() - first_local;
  role.begin = split.begin(part);
  role.end = split.end(part);
  return role;
}

DEEPEP_KERNEL(dispatch_kernel, DispatchArgs, kThreads) {
  using namespace dev;
  const Group& g = args.group;
  const DispatchShared shared{g.num_ranks, num_warps()};
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = load(&g.state->dispatch_epoch) + 1;
  const DispatchRole role = role_of_block(args);

  if (thread() == 0) SharedArray<uint32_t>(shared.failed()).set(0, 0);
  if (block() == 0) tell(args, epoch);
  if (!args.cached) place(args, role);
  sync_block();
  const bool heard = hear(args, epoch, deadline);
  if (heard) {
    if (block() == 0 && !args.cached) {
      SharedArray<int32_t> counts(shared.counts());
      for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads()) store(args.counts + i, counts.get(i));
    }
    if (block() == num_blocks() - 1 && args.host != nullptr) tell_host(args, epoch, deadline);
    write_rows(args, role);
    if (role.push) publish_rows(g, epoch);
    if (role.local && args.num_worst_tokens > 0)
      pad_indices(args, block() - (num_blocks() - args.local_blocks), args.local_blocks);
    if (block() == 0) await_rows(args, epoch, deadline);
  } else if (block() == num_blocks() - 1 && args.host != nullptr) {
    tell_host(args, epoch, deadline);
  }
  leave(g, Operation::kDispatch, &g.state->dispatch_epoch);
}

}  // namespace deepep::kernels
