// Messages to the rows of their experts: the phases of a dispatch that receive.
#pragma once

#include "kernels/low_latency/dispatch_call.hpp"
#include "layout/low_latency_rows.hpp"

namespace deepep::kernels {

inline constexpr int kSpreadUnroll = 4;  // 16-byte accesses a lane has in flight

/// Waits for a source's word number `word`, which comes to `offset`; notes a fault if it does not.
[[nodiscard]] DEEPEP_DEVICE bool wait_posted(const LowLatencyDispatchCall& call, int64_t offset, int source,
                                             int, uint32_t& value) {
  return wait_word(call, offset, source, Phase::kCounts, value);
}

/// The words of all live ranks: into shared memory, 0 of a rank that is masked. False if some do not come, or
/// ranks disagree; a fault is noted. False, too, if the call is made by other means. All threads; the warp that
/// raises flags may still be at that, and does not look.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_words(const Call& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  using Words = layout::LowLatencyWords;
  const Words& room = args.slots.words();
  const int num_local = args.num_local_experts;
  const layout::Divisor& by_words = args.share.by_words;
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<uint32_t> stopped(shared.stopped());
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<uint32_t> tokens(shared.tokens());
  uint64_t* listed = SharedArray<uint64_t>(shared.listed()).at(0);
  enter(call.lines, Step::kWaitMetadata);
  measure_waits(call, [&](int source) { return args.slots.words(call.epoch, source) + 8 * Words::kDigest; });
  if (warp() < num_listeners()) {
#pragma unroll 1
    for (int i = thread(); i < by_words.by * g.num_ranks; i += num_listeners() * kWarpSize) {
      const int source = by_words.quotient(i);
      const int word = i - source * by_words.by;
      uint32_t value = 0;
      if (is_live(call, source)) {
        const int64_t offset = args.slots.words(call.epoch, source) + 8 * word;
        if (!wait_posted(call, offset, source, word, value)) {
          stopped.bit_or(0, static_cast<uint32_t>(Phase::kCounts));
        } else if (word == Words::kDigest && (value != args.share.digest || value == kRefusal)) {
          note_fault(g, Phase::kDisagreement, 1u << source, args.share.digest, value);
          stopped.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
        }
      }
      if (word == Words::kDigest) continue;
      if (word < room.rows())
        tokens.set(source * shared.token_words + word - Words::kTokens, value);
      else if (word < room.rows() + num_local)
        rows.set(source * num_local + word - room.rows(), static_cast<int32_t>(value));
    }
    mbarrier_arrive<release, block_scope>(listed);
  }
  // Whoever looks for words arrives at its deadline, if only in vain: a warp that has still not seen it after
  // as long again was kept from running.
  const Deadline late{last_deadline(call).end_ns + g.timeout_ns};
  if (ballot(!mbarrier_wait<acquire, block_scope>(listed, round_of(call), late)) != 0) {
    if (lane() == 0) {
      note_fault(g, Phase::kCounts, 1u << g.rank, call.epoch, 0);
      SharedArray<uint32_t>(shared.failed()).bit_or(0, static_cast<uint32_t>(Phase::kCounts));
    }
    return false;
  }
  return stopped.get(0) == 0 && !args.refused;
}

/// Rows that sources before `source` send a local expert: in (source rank, source token) order those of
/// `source` begin there.
[[nodiscard]] DEEPEP_DEVICE int rows_before(const LowLatencyDispatchCall& call, int source, int expert) {
  dev::SharedArray<int32_t> rows(call.shared().rows());
  int before = 0;
  DEEPEP_ROLLED
  for (int s = 0; s < source; ++s) before += rows.get(s * call.args.num_local_experts + expert);
  return before;
}

/// Counts and ranges to the user, and to the handle which tokens came. By block 0.
DEEPEP_DEVICE void hand_out(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  if (call.block != 0) return;
  const LowLatencyDispatchShared shared = call.shared();
  SharedArray<int32_t> rows(shared.rows());
  SharedArray<uint32_t> tokens(shared.tokens());
  for (int l = thread(); l < args.num_local_experts; l += num_threads()) {
    int32_t row = 0;
    DEEPEP_ROLLED
    for (int s = 0; s < g.num_ranks; ++s) {
      const int32_t count = rows.get(s * args.num_local_experts + l);
      store(args.recv_range + l * g.num_ranks + s, layout::pack_range(row, count));
      row += count;
    }
    store(args.recv_count + l, row);
  }
  const int words = (args.max_tokens + 31) / 32;
  DEEPEP_ROLLED
  for (int s = 0; s < g.num_ranks; ++s)
    for (int word = thread(); word < words; word += num_threads())
      store(args.handle.came + s * words + word, tokens.get(s * shared.token_words + word));
}

/// A message's rows: lane k has its k-th entry's.
struct SpreadTo {
  uint32_t entries;  // those that have a row of their own, as bits: of several for one expert the first
  uint32_t entry;    // with the number among all rows of the expert, or kNoEntry
  int64_t row;       // of [L * R * M]
  uint32_t scale;    // of [L, columns, R * M]: of the row's first column
};

/// Where a message goes. One warp.
[[nodiscard]] DEEPEP_DEVICE SpreadTo read_header(const LowLatencyDispatchCall& call, const std::byte* message,
                                                 const MessageAt& at) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  SpreadTo to{0, layout::kNoEntry, 0, 0};
  if (lane() < args.num_topk)
    to.entry = load(reinterpret_cast<const uint32_t*>(message + call.message.entry(lane())));
  bool is_first = false;
  if (to.entry != layout::kNoEntry) {
    is_first = (to.entry & layout::kRepeated) == 0;
    const int expert = layout::entry_expert(to.entry);
    const int row = rows_before(call, at.source, expert) + layout::entry_row(to.entry);
    to.entry = layout::pack_entry(expert, row);
    to.row = layout::packed_row(call.g.num_ranks, args.max_tokens, expert, row);
    const int columns = args.packs_scales ? call.message.num_scales / 4 : call.message.num_scales;
    const int room = call.g.num_ranks * args.max_tokens;
    to.scale =
        static_cast<uint32_t>(expert * columns) * static_cast<uint32_t>(room) + static_cast<uint32_t>(row);
  }
  to.entries = ballot(is_first);
  return to;
}

/// A message's route into the handle, and where its rows came from to the user. One warp.
DEEPEP_DEVICE void keep_route(const LowLatencyDispatchCall& call, const std::byte* message, const MessageAt& at,
                              const SpreadTo& to) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  uint32_t* route = args.handle.routes + (int64_t{at.source} * args.max_tokens + at.token) *
                                             layout::LowLatencyMessage::header_words(args.num_topk);
  if (lane() < args.num_topk) {
    store(route + lane(), to.entry);
    if (args.weights_travel)
      store(route + args.num_topk + lane(),
            load(reinterpret_cast<const uint32_t*>(message + call.message.weight(lane()))));
  }
  if ((to.entries >> lane()) & 1u) store(args.recv_source + to.row, at.token);
}

/// Some of a message's chunks, 512 bytes of channels each, in a warp's registers; with the scales of FP8, which
/// lanes 0, 8, 16, 24 hold.
struct Chunks {
  dev::Vec16 channels[kSpreadUnroll];
  uint32_t scale[kSpreadUnroll];
};

/// Chunks first, first + step, ...
[[nodiscard]] DEEPEP_DEVICE Chunks load_chunks(const LowLatencyDispatchCall& call, const std::byte* message,
                                               int first, int step) {
  using namespace dev;
  const int pieces = static_cast<int>(call.message.row_bytes / 16);
  const Vec16* channels = reinterpret_cast<const Vec16*>(message + call.message.row());
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(message + call.message.scales());
  const bool has_scale = call.args.casts && lane() % 8 == 0;
  Chunks chunks = {};
#pragma unroll
  for (int u = 0; u < kSpreadUnroll; ++u) {
    const int piece = (first + u * step) * kWarpSize + lane();
    if (piece >= pieces) continue;
    chunks.channels[u] = load_streaming(channels + piece);
    if (has_scale) chunks.scale[u] = load(scales + piece / 8);
  }
  return chunks;
}

/// UE8M0: the exponents of a chunk's scales, four to a word.
[[nodiscard]] DEEPEP_DEVICE uint32_t pack_scales(uint32_t scale) {
  using namespace dev;
  const uint32_t exponent = (scale >> 23) & 0xffu;
  return shuffle(exponent, 0) | shuffle(exponent, 8) << 8 | shuffle(exponent, 16) << 16 |
         shuffle(exponent, 24) << 24;
}

/// Chunks first, first + step, ... to all the rows of their message. One warp.
DEEPEP_DEVICE void spread_chunks(const LowLatencyDispatchCall& call, Chunks chunks, const SpreadTo& to,
                                 int first, int step) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const int pieces = static_cast<int>(call.message.row_bytes / 16);
  const int room = call.g.num_ranks * args.max_tokens;
  const uint64_t target = reinterpret_cast<uint64_t>(args.recv_x + to.row * call.message.row_bytes);
  const bool packs = args.casts && args.packs_scales;
  const bool has_scale = args.casts && lane() % (packs ? kWarpSize : 8) == 0;
  if (packs)
#pragma unroll
    for (int u = 0; u < kSpreadUnroll; ++u) chunks.scale[u] = pack_scales(chunks.scale[u]);
  // Columns lie apart.
  const int column = packs ? first : 4 * first + lane() / 8, column_step = packs ? step : 4 * step;
#pragma unroll 1
  for (uint32_t entries = to.entries; entries != 0; entries &= entries - 1) {
    const int entry = lowest_bit(entries);
    Vec16* row = reinterpret_cast<Vec16*>(shuffle(target, entry));
    uint32_t* scales = args.recv_scales + shuffle(to.scale, entry);
#pragma unroll
    for (int u = 0; u < kSpreadUnroll; ++u) {
      const int piece = (first + u * step) * kWarpSize + lane();
      if (piece >= pieces) continue;
      store_streaming(row + piece, chunks.channels[u]);
      if (has_scale) store(scales + int64_t{column + u * column_step} * room, chunks.scale[u]);
    }
  }
}

[[nodiscard]] DEEPEP_DEVICE Presence present_of(const LowLatencyDispatchCall& call) {
  const LowLatencyDispatchShared shared = call.shared();
  return {dev::SharedArray<uint32_t>(shared.tokens()), shared.token_words};
}

[[nodiscard]] DEEPEP_DEVICE const std::byte* message_of(const LowLatencyDispatchCall& call,
                                                        const MessageAt& where) {
  return at<std::byte>(call.g, call.g.rank,
                       call.args.slots.messages(call.epoch, where.source) + where.token * call.message.bytes());
}

/// Which chunks of a message a warp has: number, number + of, ...
struct Part {
  int number;
  int of;
};

/// One message, which is here. One warp.
template <class Call>
DEEPEP_DEVICE void spread_message(const Call& call, const MessageAt& where, const Part& part) {
  using namespace dev;
  const std::byte* message = message_of(call, where);
  const int chunks = static_cast<int>((call.message.row_bytes + 16 * kWarpSize - 1) / (16 * kWarpSize));
  const Chunks first = load_chunks(call, message, part.number, part.of);
  const SpreadTo to = read_header(call, message, where);
  spread_chunks(call, first, to, part.number, part.of);
  if (part.number == part.of - 1) keep_route(call, message, where, to);
#pragma unroll 1
  for (int chunk = part.number + kSpreadUnroll * part.of; chunk < chunks; chunk += kSpreadUnroll * part.of)
    spread_chunks(call, load_chunks(call, message, chunk, part.of), to, chunk, part.of);
}

/// This rank's own messages: those that the block has written, or had written in a launch before.
template <class Call>
DEEPEP_DEVICE void spread_own(const Call& call, const Team& team) {
  enter(call.lines, Step::kLocalRows);
  const Presence present = present_of(call);
  const SentTokens tokens = tokens_of_block(call.args, call.block);
#pragma unroll 1
  for (int t = tokens.begin + team.number; t < tokens.end; t += team.teams)
    if (present.has(call.g.rank, t)) spread_message(call, {call.g.rank, t}, {team.part, team.parts});
}

/// Waits for a message of another rank, by its flag. One thread.
[[nodiscard]] DEEPEP_DEVICE bool wait_message(const LowLatencyDispatchCall& call, const uint32_t* flag,
                                              int source) {
  return wait_flag(call, flag, source, Phase::kRows);
}

/// Others' messages, each when it is there. One whose flag does not come in time is a fault.
template <class Call>
DEEPEP_DEVICE void spread_others(const Call& call, const Team& team) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  auto walk = walk_of(call, present_of(call), team);
#pragma unroll 1
  for (MessageAt where = walk.next(); where.token >= 0; where = walk.next()) {
    bool came = true;
    enter(call.lines, Step::kWaitRows);
    if (lane() == 0) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.message_flags(call.epoch, where.source));
      came = wait_message(call, flags + where.token, where.source);
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kRows));
      return;  // the deadline has passed: what is still missing will not be waited for again
    }
    sync_warp();  // lane 0's acquire comes before the whole warp's reads
    enter(call.lines, Step::kSpread);
    spread_message(call, where, {where.strip * team.parts + team.part, team.parts << args.share.strip_shift});
  }
}

/// The lower half of the warps spreads this rank's messages, while the upper half, of which one may still raise
/// flags, waits for others'.
template <class Call>
DEEPEP_DEVICE void spread_messages(const Call& call) {
  using namespace dev;
  const LowLatencyShare& share = call.args.share;
  const int half = num_warps() / 2;
  const bool has_own = warp() < half || half == 0;
  if (has_own) spread_own(call, team_of(warp(), layout::max_of(half, 1), share.own_shift));
  if (warp() >= half) spread_others(call, team_of(warp() - half, num_warps() - half, share.message_shift));
}

/// -1 past each expert's last row. All warps of all blocks.
DEEPEP_DEVICE void mark_rest(const LowLatencyDispatchCall& call) {
  using namespace dev;
  const LowLatencyDispatchArgs& args = call.args;
  const int room = call.g.num_ranks * args.max_tokens;
#pragma unroll 1
  for (int l = warp() * num_blocks() + call.block; l < args.num_local_experts; l += num_warps() * num_blocks())
    for (int row = rows_before(call, call.g.num_ranks, l) + lane(); row < room; row += kWarpSize)
      store(args.recv_source + l * room + row, -1);
}

/// All that a block receives; with masks, where a rank is missing, once more by the last block, without it.
template <class Call>
DEEPEP_DEVICE void receive_messages(Call& call) {
#pragma unroll 1
  do {
    if (!wait_words(call)) continue;
    hand_out(call);
    spread_messages(call);
    mark_rest(call);
  } while (mends(call));
}

}  // namespace deepep::kernels
