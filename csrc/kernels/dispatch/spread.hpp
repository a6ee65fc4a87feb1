// Rows to the expanded layout: one for each of a row's top-k entries here, grouped by expert. This rank's own
// straight from the tokens, those of others as they arrive.
//
// An entry's row follows from three numbers: where its expert begins, the entries of it that lower ranks send,
// and its place among its rank's own, which travels with the row.
#pragma once

#include "kernels/dispatch/handle.hpp"
#include "kernels/dispatch/scale_tiles.hpp"
#include "kernels/dispatch/write.hpp"

namespace deepep::kernels {

/// Whether the entries of all ranks are known, and rows are spread here: they fit, or the host does not wait,
/// so that those that do not are left out. Where the entries of each source begin goes to shared memory. Whole
/// block.
[[nodiscard]] DEEPEP_DEVICE bool learn_bases(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const ExpandedRows& to = args.expanded;
  const Group& g = call.g;
  const int experts = args.num_local_experts;
  const layout::MailboxWords words{g.num_ranks};
  const NumberingShared shared = NumberingShared::of(args, num_warps());
  SharedArray<int32_t> bases(shared.bases()), entries(shared.entries()), begins(shared.begins());
  SharedArray<int32_t> num_rows(shared.num_rows());
  SharedArray<uint32_t> failed(MetadataShared{g.num_ranks}.failed());
  SharedArray<uint32_t> gave_up(shared.gave_up());
  if (to.recv_places == nullptr) return false;
  for (int i = thread(); i < g.num_ranks * experts; i += num_threads()) {
    const int source = i / experts;
    uint32_t value = 0;
    const int64_t word = g.control.mailbox(source, call.epoch) + 8 * words.expert_count(i % experts);
    if (is_live(g, source) &&
        !wait_tag<relaxed, sys_scope>(at<uint64_t>(g, g.rank, word), call.epoch, call.deadline, value)) {
      note_fault(g, Phase::kCounts, 1u << source, call.epoch, value);
      failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      gave_up.bit_or(0, 1u << source);
      value = 0;
    }
    bases.set(i, static_cast<int32_t>(value));
  }
  sync_block();
  for (int l = thread(); l < experts; l += num_threads()) {
    int32_t total = 0;
    for (int s = 0; s < g.num_ranks; ++s) {
      const int32_t count = bases.get(s * experts + l);
      bases.set(s * experts + l, total);
      total += count;
    }
    entries.set(l, total);
    if (local_block(args) == 0) store(to.expert_counts + l, total);
  }
  sync_block();
  if (warp() == 0) {
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < experts; first += kWarpSize) {
      const int l = first + lane();
      const int rows = l < experts ? static_cast<int>(layout::align_up(entries.get(l), to.alignment)) : 0;
      const int sum = warp_exclusive_sum(rows);
      if (l < experts) begins.set(l, before + sum);
      before += warp_sum(rows);
    }
    if (lane() == 0) num_rows.set(0, before);
  }
  sync_block();
  for (int i = thread(); i < g.num_ranks * experts; i += num_threads())
    bases.set(i, bases.get(i) + begins.get(i % experts));
  sync_block();
  return gave_up.bit_or(0, 0u) == 0 && (args.host == nullptr || num_rows.get(0) <= to.capacity);
}

/// Local blocks: whether they spread rows.
[[nodiscard]] DEEPEP_DEVICE bool find_bases(const DispatchCall& call, const WarpShare& share) {
  return share.role.local && learn_bases(call);
}

/// The same of push blocks, whose rows are all written and said to be. Not where others of this rank have not
/// started: peers that wait for their rows might be waited for here, and no SM be left for them. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool join_spreading(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  if (!share.role.push) return false;
  SharedArray<uint32_t> joins(NumberingShared::of(call.args, num_warps()).joins());
  if (thread() == 0) {
    const uint32_t started = dev::load<relaxed, gpu_scope>(&call.g.state->pushes_started);
    joins.set(0, started == static_cast<uint32_t>(call.args.push_blocks) ? 1u : 0u);
  }
  sync_block();
  return joins.get(0) != 0 && learn_bases(call);
}

/// Where scale i of an expanded row is.
[[nodiscard]] DEEPEP_DEVICE uint32_t* scale_at(const DispatchArgs& args, int64_t row, int i) {
  const ExpandedRows& to = args.expanded;
  if (!to.column_major) return to.scales + row * args.num_scales + i;
  return to.scales + row + i * rows_of_column(args);
}

/// A received row's entry, of lane k the k-th.
struct RowEntry {
  int32_t expert;  // local, or -1
  int32_t place;
  uint32_t weight;
};

/// The row of this rank's token t.
struct OwnRow {
  static constexpr bool kArrived = false;
  const DispatchArgs& args;
  int64_t token;
  bool has_places;

  [[nodiscard]] DEEPEP_DEVICE RowEntry entry() const {
    const int64_t at = token * args.num_topk + dev::lane();
    const int expert = expert_of_entry(args, at);
    if (expert < 0 || args.experts_per_rank.quotient(expert) != args.group.rank || !has_places)
      return {-1, kNoPlace, 0};
    return {args.experts_per_rank.remainder(expert), dev::load(args.expanded.places + at),
            dev::load_once(args.topk_weights + at)};
  }
  [[nodiscard]] DEEPEP_DEVICE const std::byte* bytes() const { return args.x + token * args.row_bytes; }
  [[nodiscard]] DEEPEP_DEVICE uint32_t scale(int i) const { return scale_of(args, token, i); }
  [[nodiscard]] DEEPEP_DEVICE int32_t origin() const { return ~static_cast<int32_t>(token); }
};

/// A row that has arrived.
struct ArrivedRow {
  static constexpr bool kArrived = true;
  const DispatchArgs& args;
  int64_t row;

  template <class T>
  [[nodiscard]] DEEPEP_DEVICE const T* array(layout::SlotArray array) const {
    return recv_array<T>(args, args.group.rank, array);
  }
  [[nodiscard]] DEEPEP_DEVICE RowEntry entry() const {
    const int64_t at = row * args.num_topk + dev::lane();
    const int64_t index = args.index_bytes == 8 ? dev::load(array<int64_t>(layout::kSlotIndices) + at)
                                                : int64_t{dev::load(array<int32_t>(layout::kSlotIndices) + at)};
    const int32_t expert = index >= 0 && index < args.num_local_experts ? static_cast<int32_t>(index) : -1;
    return {expert, dev::load(array<int32_t>(layout::kSlotPlaces) + at),
            dev::load(array<uint32_t>(layout::kSlotWeights) + at)};
  }
  [[nodiscard]] DEEPEP_DEVICE const std::byte* bytes() const {
    return array<std::byte>(layout::kSlotRows) + row * args.row_bytes;
  }
  [[nodiscard]] DEEPEP_DEVICE uint32_t scale(int i) const {
    return dev::load(array<uint32_t>(layout::kSlotScales) + row * args.num_scales + i);
  }
  [[nodiscard]] DEEPEP_DEVICE int32_t origin() const { return static_cast<int32_t>(row); }
};

/// Entry `at` of the slots. Ordered, though it carries nothing: after a time-out two blocks may write one.
DEEPEP_DEVICE void save_slot(const DispatchArgs& args, int64_t at, int64_t slot) {
  using namespace dev;
  store<relaxed, gpu_scope>(args.expanded.slots + at, static_cast<uint64_t>(slot));
}

/// Row `number` of those received, from rank `source`, to the rows of its entries. One warp.
template <class Row>
DEEPEP_DEVICE void spread_row(const DispatchCall& call, const Row& row, int64_t number, int source) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const ExpandedRows& to = args.expanded;
  SharedArray<int32_t> bases(NumberingShared::of(args, num_warps()).bases());
  RowEntry entry{-1, kNoPlace, 0};
  if (lane() < args.num_topk) entry = row.entry();
  int64_t slot = -1;
  if (entry.expert >= 0)
    slot = int64_t{bases.get(source * args.num_local_experts + entry.expert)} + entry.place;
  if (slot >= to.capacity && to.overflow != nullptr) store<relaxed, gpu_scope>(to.overflow, 1u);
  if (slot < 0 || slot >= to.capacity) slot = -1;
  if (lane() < args.num_topk) save_slot(args, number * args.num_topk + lane(), slot);
  if (slot >= 0) store(to.weights + slot, entry.weight);
  const uint32_t targets = ballot(slot >= 0);
  if (targets == 0) return;
  const bool are_columns = args.num_scales > 0 && to.column_major;
  // Before the row: behind its stores the release would wait for them.
  if (are_columns) bring_scales(args, entry.expert, static_cast<int>(slot), row.origin());
  const uint64_t target = reinterpret_cast<uint64_t>(to.x) + static_cast<uint64_t>(slot * args.row_bytes);
  copy_row<Row::kArrived>(reinterpret_cast<uint64_t>(row.bytes()), target,
                          static_cast<int>(args.row_bytes / 16), targets);
  if (are_columns) return;
#pragma unroll 1
  for (int first = 0; first < args.num_scales; first += kWarpSize) {
    const int i = first + lane();
    const uint32_t scale = i < args.num_scales ? row.scale(i) : 0u;
    for (uint32_t left = targets; left != 0; left &= left - 1) {
      const int64_t at = shuffle(slot, lowest_bit(left));
      if (i < args.num_scales) store(scale_at(args, at, i), scale);
    }
  }
}

/// Local blocks: this rank's own tokens, their fields and their part of the handle. The row is not among those
/// received, but for its fields.
DEEPEP_DEVICE void spread_own_rows(const DispatchCall& call, const WarpShare& share,
                                   const FirstToken& first_token) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  const WarpTokens& mine = share.mine;
  if (!share.role.local) return;
  SharedArray<int32_t> counts(MetadataShared{g.num_ranks}.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const bool handles = lane() == g.rank;
  int32_t next_row = static_cast<int32_t>(layout::first_row_of_source(count, g.rank, g.rank)) +
                     shuffle(first_token.before, g.rank);
#pragma unroll 1
  for (int64_t first = mine.begin; first < mine.end; first += kWarpSize) {
    const int size = static_cast<int>(layout::min_of(mine.end - first, static_cast<int64_t>(kWarpSize)));
    const uint32_t going = going_of<DispatchMode::kExpanded>(args, first, size, 1u << g.rank);
    const TokenGroup group{first, size, going, next_row};
    const Entry entry = read_entry(args, first, size, lane());
    save_send_rows(args, group, handles);
    write_fields(args, group, entry);
    const bool has_places = wait_places(call, first, size);
    const uint32_t here = shuffle(going, g.rank);
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      if ((here >> i) & 1u)
        spread_row(call, OwnRow{args, first + i, has_places}, next_row++, g.rank);
    }
  }
}

/// Local blocks: rows between the experts'.
DEEPEP_DEVICE void zero_gaps(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const ExpandedRows& to = args.expanded;
  if (!share.role.local || to.alignment == 1) return;
  const NumberingShared shared = NumberingShared::of(args, num_warps());
  SharedArray<int32_t> entries(shared.entries()), begins(shared.begins());
  const int widest = to.alignment - 1;
#pragma unroll 1
  for (int64_t i = local_block(args) * num_warps() + warp(); i < int64_t{args.num_local_experts} * widest;
       i += args.local_blocks * num_warps()) {
    const int l = static_cast<int>(i / widest);
    const int count = entries.get(l);
    const int end = static_cast<int>(layout::align_up(count, to.alignment));
    const int at = count + static_cast<int>(i % widest);
    const int64_t row = begins.get(l) + at;
    if (at >= end || row >= to.capacity) continue;
    if (lane() == 0) store(to.weights + row, 0u);
    for (int s = lane(); s < args.num_scales; s += kWarpSize) store(scale_at(args, row, s), 0u);
    if (!to.zero_padding) continue;
    Vec16* bytes = reinterpret_cast<Vec16*>(to.x + row * args.row_bytes);
    for (int v = lane(); v < static_cast<int>(args.row_bytes / 16); v += kWarpSize)
      store_streaming(bytes + v, Vec16{});
  }
}

/// Entries [begin, end) of the slots, that have no row: by this warp, or by all of this rank.
DEEPEP_DEVICE void clear_slots(const DispatchArgs& args, int64_t begin, int64_t end, int first, int step) {
  for (int64_t i = begin + first; i < end; i += step) save_slot(args, i, -1);
}

/// Local blocks, instead, where the dispatch was given up before a row moved: no entry has a row.
DEEPEP_DEVICE void clear_expanded(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  if (!share.role.local || args.expanded.recv_places == nullptr) return;
  const int first = local_block(args) * num_threads() + thread();
  const int step = args.local_blocks * num_threads();
  clear_slots(args, 0, args.slot_capacity * args.num_topk, first, step);
  for (int l = first; l < args.num_local_experts; l += step) store(args.expanded.expert_counts + l, 0);
}

/// Source `source`'s rows did not come: none has entries here, so that a combine queued behind reads no row
/// that is none. One warp, once a block.
DEEPEP_DEVICE void give_rows_up(const DispatchCall& call, int source, uint32_t seen) {
  using namespace dev;
  const Group& g = call.g;
  const MetadataShared shared{g.num_ranks};
  SharedArray<uint32_t> gave_up(NumberingShared::of(call.args, num_warps()).gave_up());
  uint32_t before = 0;
  if (lane() == 0) before = gave_up.bit_or(0, 1u << source);
  if ((shuffle(before, 0) >> source) & 1u) return;
  if (lane() == 0) {
    note_fault(g, Phase::kRows, 1u << source, call.epoch, seen);
    SharedArray<uint32_t>(shared.failed()).bit_or(0, static_cast<uint32_t>(Phase::kRows));
  }
  SharedArray<int32_t> counts(shared.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const int64_t first = layout::first_row_of_source(count, source, g.rank) * call.args.num_topk;
  const int64_t end = first + int64_t{count(source, g.rank)} * call.args.num_topk;
  clear_slots(call.args, first, end, lane(), kWarpSize);
}

/// Which rank's stream, of which block and warp.
struct Stream {
  int source;
  int block;
  int warp;
};

/// Streams of all peers.
[[nodiscard]] DEEPEP_DEVICE int num_streams(const DispatchCall& call) {
  const Group& g = call.g;
  dev::SharedArray<uint32_t> push_blocks(MetadataShared{g.num_ranks}.push_blocks());
  int streams = 0;
  DEEPEP_ROLLED
  for (int s = 0; s < g.num_ranks; ++s)
    if (s != g.rank && is_live(g, s)) streams += static_cast<int>(push_blocks.get(s)) * (dev::num_warps() - 1);
  return streams;
}

/// The n-th of them: a rank's blocks in turn, so that what is likely to come first has low numbers.
[[nodiscard]] DEEPEP_DEVICE Stream stream_of(const DispatchCall& call, int n) {
  const Group& g = call.g;
  dev::SharedArray<uint32_t> push_blocks(MetadataShared{g.num_ranks}.push_blocks());
  DEEPEP_ROLLED
  for (int s = 0; s < g.num_ranks; ++s) {
    if (s == g.rank || !is_live(g, s)) continue;
    const int blocks = static_cast<int>(push_blocks.get(s));
    const int streams = blocks * (dev::num_warps() - 1);
    if (n < streams) return {s, n % blocks, n / blocks};
    n -= streams;
  }
  return {g.rank, 0, 0};
}

/// The number of rows that the longest stream of a peer may have.
[[nodiscard]] DEEPEP_DEVICE uint32_t longest_stream(const DispatchCall& call) {
  const Group& g = call.g;
  dev::SharedArray<uint32_t> tokens(MetadataShared{g.num_ranks}.stream_tokens());
  uint32_t longest = 0;
  DEEPEP_ROLLED
  for (int s = 0; s < g.num_ranks; ++s)
    if (s != g.rank && is_live(g, s)) longest = layout::max_of(longest, tokens.get(s));
  return longest;
}

/// Until the stream's row is here; -1 if the stream has no nth one, -2 if it did not come. One warp.
[[nodiscard]] DEEPEP_DEVICE int32_t wait_row(const DispatchCall& call, const Stream& stream, uint32_t nth) {
  using namespace dev;
  const Group& g = call.g;
  const uint64_t* words = at<uint64_t>(g, g.rank, g.control.stream(stream.source, stream.block, stream.warp));
  uint32_t value = 0;
  bool came = true;
  // The words carry nothing but themselves; where the row is, and whether there is one.
  if (lane() <= layout::kStreamCount)
    came = wait_tag<relaxed, sys_scope>(words + lane(), call.epoch, call.deadline, value);
  const bool is_known = ballot(!came) == 0;
  const uint32_t row = shuffle(value, layout::kStreamBegin) + nth;
  if (is_known && nth >= shuffle(value, layout::kStreamCount)) return -1;
  uint32_t seen = value;
  if (is_known && lane() == 0) {
    // Acquire: the row and its fields were written before; the warp's barrier hands that on.
    for (;;) {
      const Tagged next = unpack_tagged(dev::load<acquire, sys_scope>(words + layout::kStreamNext));
      seen = next.tag == call.epoch ? next.value : 0u;
      came = next.tag == call.epoch && next.value > row;
      if (came || call.deadline.passed()) break;
      pause();
    }
  }
  sync_warp();
  if (is_known && ballot(!came) == 0) return static_cast<int32_t>(row);
  give_rows_up(call, stream.source, shuffle(seen, 0));
  return -2;
}

/// Rows of the peers, each claimed by a warp, the first of every stream before the second of any: by local
/// blocks when they have spread their own, by push blocks when they have pushed theirs.
DEEPEP_DEVICE void spread_received_rows(const DispatchCall& call) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const uint32_t streams = static_cast<uint32_t>(num_streams(call));
  const uint32_t end = streams * longest_stream(call);
  uint32_t* claims = &call.g.state->rows_claimed;
  uint32_t next = lane() == 0 ? fetch_add<relaxed, gpu_scope>(claims, 1u) : 0u;
  for (;;) {
    const uint32_t claim = shuffle(next, 0);
    if (claim >= end) break;
    if (lane() == 0) next = fetch_add<relaxed, gpu_scope>(claims, 1u);
    const uint32_t nth = claim / streams;
    const Stream stream = stream_of(call, static_cast<int>(claim - nth * streams));
    const int32_t row = wait_row(call, stream, nth);
    if (row >= 0 && row < args.slot_capacity) spread_row(call, ArrivedRow{args, row}, row, stream.source);
  }
  sync_block();  // the block's claims come before the epoch advances, and they are taken back
}

/// Where rows are spread: entries of the rows past the last received one have none; or of all rows, if that was
/// given up before the first.
DEEPEP_DEVICE void pad_slots(const DispatchCall& call, const WarpShare& share, bool is_spread) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const Group& g = call.g;
  if (!share.role.local || args.expanded.recv_places == nullptr) return;
  SharedArray<int32_t> counts(MetadataShared{g.num_ranks}.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const int64_t received = layout::first_row_of_source(count, g.num_ranks, g.rank);
  const int64_t end = layout::max_of(received, args.num_worst_tokens);
  clear_slots(args, (is_spread ? received : 0) * args.num_topk, end * args.num_topk,
              local_block(args) * num_threads() + thread(), args.local_blocks * num_threads());
}

}  // namespace deepep::kernels
