// Messages to the rows of their experts: the phases of a dispatch that receive.
#pragma once

#include "kernels/low_latency/dispatch_call.hpp"
#include "layout/low_latency_rows.hpp"

namespace deepep::kernels {

inline constexpr int kSpreadUnroll = 4;

/// The words of all live ranks: counts into shared memory, 0 of a rank that is masked. All threads, with a
/// barrier. False on all if some do not come, or ranks disagree; a fault is noted. False, too, if the call is
/// made by other means.
[[nodiscard]] DEEPEP_DEVICE bool wait_words(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  const int num_local = args.num_local_experts;
  using Words = layout::LowLatencyWords;
  const Words words{num_local};
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<int32_t> bases(shared.bases());
  SharedArray<int32_t> messages(shared.messages());
  const uint32_t digest = digest_of(args);
#pragma unroll 1
  for (int i = thread(); i < words.count() * g.num_ranks; i += num_threads()) {
    const int source = i / words.count();
    const int word = i - source * words.count();
    uint32_t value = 0;
    if (is_live(g, source)) {
      const int64_t offset = args.slots.words(call.epoch, source) + 8 * word;
      if (!wait_word(g, offset, source, Phase::kCounts, call.epoch, call.deadline, value)) {
        failed.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
      } else if (word == Words::kDigest && (value != digest || value == kRefusal)) {
        note_fault(g, Phase::kDisagreement, 1u << source, digest, value);
        failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      }
    }
    if (word >= Words::kRows) bases.set(source * num_local + word - Words::kRows, static_cast<int32_t>(value));
    if (word == Words::kMessages) messages.set(source, static_cast<int32_t>(value));
  }
  sync_block();
  return failed.get(0) == 0 && !args.refused;
}

/// The messages of a dispatch, this rank's own first: they come first.
[[nodiscard]] DEEPEP_DEVICE MessageList messages_of(const LowLatencyDispatchCall& call) {
  return {dev::SharedArray<int32_t>(call.shared().list()), call.g.rank, call.g.num_ranks};
}

/// Makes of each source's counts where its rows begin; block 0 hands them out. All threads, with a barrier.
DEEPEP_DEVICE void list_rows(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  const int num_local = args.num_local_experts;
  const int room = g.num_ranks * args.max_tokens;
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<int32_t> bases(shared.bases());
  SharedArray<int32_t> messages(shared.messages());
  SharedArray<int32_t> totals(shared.totals());
  for (int l = thread(); l < num_local; l += num_threads()) {
    int32_t row = 0;
    DEEPEP_ROLLED
    for (int s = 0; s < g.num_ranks; ++s) {
      const int32_t rows = bases.get(s * num_local + l);
      bases.set(s * num_local + l, row);
      if (block() == 0) store(args.recv_range + l * g.num_ranks + s, layout::pack_range(row, rows));
      row += rows;
    }
    totals.set(l, row);
    if (block() == 0) store(args.recv_count + l, row);
  }
  if (block() == 0)
    for (int s = thread(); s < g.num_ranks; s += num_threads())
      store(args.handle.num_messages + s, messages.get(s));
  if (thread() == 0) list_messages(messages_of(call), [&](int s) { return messages.get(s); });
  sync_block();
#pragma unroll 1
  for (int l = block(); l < num_local; l += num_blocks())
    for (int row = totals.get(l) + thread(); row < room; row += num_threads())
      store(args.recv_source + l * room + row, -1);
}

/// A message's rows: lane k has its k-th entry's.
struct SpreadTo {
  uint32_t entries;  // those that have a row of their own, as bits: of several for one expert the first
  uint32_t entry;    // with the number among all rows of the expert, or kNoEntry
  int64_t row;       // of [L * R * M]
};

/// Where a message goes, and its route into the handle. One warp; `keeps`: it writes the route.
[[nodiscard]] DEEPEP_DEVICE SpreadTo read_header(const LowLatencyDispatchCall& call, const std::byte* message,
                                                 const MessageAt& at, bool keeps) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<int32_t> bases(call.shared().bases());
  const bool has_entry = lane() < args.num_topk;
  SpreadTo to{0, layout::kNoEntry, 0};
  if (has_entry) to.entry = load(reinterpret_cast<const uint32_t*>(message + call.message.entry(lane())));
  bool is_first = to.entry != layout::kNoEntry;
  if (is_first) {
    const int expert = layout::entry_expert(to.entry);
    const int row = bases.get(at.source * args.num_local_experts + expert) + layout::entry_row(to.entry);
    to.entry = layout::pack_entry(expert, row);
    to.row = layout::packed_row(g.num_ranks, args.max_tokens, expert, row);
  }
#pragma unroll 1
  for (int k = 0; k < args.num_topk; ++k) {
    const uint32_t earlier = shuffle(to.entry, k);
    is_first = is_first && (k >= lane() || earlier != to.entry);
  }
  to.entries = ballot(is_first);
  if (!keeps) return to;
  const uint32_t token = load(reinterpret_cast<const uint32_t*>(message));
  uint32_t* route = args.handle.routes + (int64_t{at.source} * args.max_tokens + at.position) *
                                             layout::LowLatencyMessage::header_words(args.num_topk);
  if (lane() == 0) store(route, token);
  if (has_entry) {
    store(route + 1 + lane(), to.entry);
    const uint32_t weight = load(reinterpret_cast<const uint32_t*>(message + call.message.weight(lane())));
    store(route + 1 + args.num_topk + lane(), weight);
  }
  if (is_first) store(args.recv_source + to.row, static_cast<int32_t>(token));
  return to;
}

/// A part of a message's channels to all its rows. One warp.
DEEPEP_DEVICE void spread_channels(const LowLatencyDispatchCall& call, const std::byte* message,
                                   const SpreadTo& to, const WarpRows& mine) {
  using namespace dev;
  const int pieces = static_cast<int>(call.message.row_bytes / 16);
  const Vec16* from = reinterpret_cast<const Vec16*>(message + call.message.row());
  const uint64_t target = reinterpret_cast<uint64_t>(call.args.recv_x + to.row * call.message.row_bytes);
  const int end = pieces * (mine.part + 1) / mine.parts;
#pragma unroll 1
  for (int begin = pieces * mine.part / mine.parts + lane(); begin < end + lane();
       begin += kSpreadUnroll * kWarpSize) {
    const int left = end - begin;
    Vec16 v[kSpreadUnroll] = {};
#pragma unroll
    for (int u = 0; u < kSpreadUnroll; ++u)
      if (u * kWarpSize < left) v[u] = load_streaming(from + begin + u * kWarpSize);
#pragma unroll 1
    for (uint32_t entries = to.entries; entries != 0; entries &= entries - 1) {
      Vec16* row = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(entries))) + begin;
#pragma unroll
      for (int u = 0; u < kSpreadUnroll; ++u)
        if (u * kWarpSize < left) store_streaming(row + u * kWarpSize, v[u]);
    }
  }
}

/// A message's scales to all its rows: columns lie apart. One warp.
DEEPEP_DEVICE void spread_scales(const LowLatencyDispatchCall& call, const std::byte* message,
                                 const SpreadTo& to) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const int64_t room = int64_t{call.g.num_ranks} * args.max_tokens;
  const int each = args.packs_scales ? 4 : 1;  // scales in a word
  const int columns = call.message.num_scales / each;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(message + call.message.scales());
  const uint32_t entry = to.entry;
#pragma unroll 1
  for (int column = lane(); column < columns + lane(); column += kWarpSize) {
    uint32_t word = 0;
    if (column < columns) {
      word = load(from + column * each);
      if (args.packs_scales) {
        word = (word >> 23) & 0xffu;
#pragma unroll 1
        for (int i = 1; i < 4; ++i) word |= ((load(from + column * 4 + i) >> 23) & 0xffu) << (8 * i);
      }
    }
#pragma unroll 1
    for (uint32_t entries = to.entries; entries != 0; entries &= entries - 1) {
      const uint32_t there = shuffle(entry, lowest_bit(entries));
      if (column >= columns) continue;
      store(args.recv_scales + (int64_t{layout::entry_expert(there)} * columns + column) * room +
                layout::entry_row(there),
            word);
    }
  }
}

/// The block's messages, each when it is there. One whose flag does not come in time is a fault.
DEEPEP_DEVICE void spread_messages(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const MessageList list = messages_of(call);
  const int count = rows_of_block(list.size());
  const WarpRows mine = rows_of_warp(count);
#pragma unroll 1
  for (int i = mine.first; i < count; i += mine.step) {
    const MessageAt where = message_at(list, block() + i * num_blocks());
    bool came = true;
    if (lane() == 0) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.message_flags(call.epoch, where.source));
      came = wait_flag(call, flags + where.position, where.source, Phase::kRows);
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kRows));
      return;  // the deadline has passed: what is still missing will not be waited for again
    }
    sync_warp();  // lane 0's acquire comes before the whole warp's reads
    const std::byte* message = at<std::byte>(
        g, g.rank, args.slots.messages(call.epoch, where.source) + where.position * call.message.bytes());
    const SpreadTo to = read_header(call, message, where, mine.part == 0);
    spread_channels(call, message, to, mine);
    if (mine.part == 0 && args.casts) spread_scales(call, message, to);
  }
}

}  // namespace deepep::kernels
