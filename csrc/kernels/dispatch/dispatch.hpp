// High-throughput dispatch: every row goes straight to its final place at its receiver.
//
//   tell, hear  the ranks' counts and slots go round (exchange.hpp)
//   place       meanwhile every warp works out how many earlier tokens of this rank go where its own go
//   write       push blocks write rows that leave the rank, local blocks those that stay
//   publish     each push block raises its flag at each peer, after its rows
//   arrive      the last block waits for the flags of all peers' push blocks; the kernel's end publishes the rest
#pragma once

#include "kernels/dispatch/exchange.hpp"
#include "kernels/dispatch/metadata.hpp"

namespace deepep::kernels {

inline constexpr int kDispatchThreads = 512;
inline constexpr int kPlaceBatch = 8;  // tokens a thread looks at together
inline constexpr int kUnroll = 14;     // 16-byte accesses a lane has in flight: 7 KiB of a row a warp
inline constexpr int kMaxParts = 4;    // of a row, where tokens are few

/// The block's dynamic shared memory: what it hears, and what `place` counts.
struct DispatchShared {
  int num_ranks;
  int warps;

  /// Tokens of each warp's own that go to each rank: int32 [warps, R].
  [[nodiscard]] DEEPEP_HD int64_t own() const { return layout::align_up(ExchangeShared{num_ranks}.bytes(), 16); }
  /// The same of each warp's share of the tokens before the block's: int32 [warps, R].
  [[nodiscard]] DEEPEP_HD int64_t before() const { return own() + 4 * static_cast<int64_t>(warps) * num_ranks; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return before() + 4 * static_cast<int64_t>(warps) * num_ranks; }
};

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

/// The tokens of one warp: those of its block are dealt out in stretches. Where there are fewer than warps, several
/// warps share a token, each a part of its row.
struct WarpTokens {
  int64_t begin;  // tokens [begin, end)
  int64_t end;
  int part;
  int parts;
};

[[nodiscard]] DEEPEP_DEVICE WarpTokens tokens_of_warp(const DispatchRole& role) {
  const int tokens = static_cast<int>(role.end - role.begin);
  if (tokens == 0) return {role.end, role.end, 0, 1};
  const int warps = dev::num_warps();
  int parts = 1;
  DEEPEP_ROLLED
  while (parts < kMaxParts && tokens * (parts + 1) <= warps) ++parts;
  const int teams = warps / parts;
  const layout::SplitOf<int> split{tokens, teams};
  const int team = dev::warp() / parts;
  if (team >= teams) return {role.end, role.end, 0, parts};
  return {role.begin + split.begin(team), role.begin + split.end(team), dev::warp() - team * parts, parts};
}

/// Bit r: token t goes to rank r, and that concerns the role (its bit is in `wanted`).
[[nodiscard]] DEEPEP_DEVICE uint32_t destinations_of(const DispatchArgs& args, int64_t t, uint32_t wanted) {
  const int ranks = args.group.num_ranks;
  uint32_t mask = 0;
  for (int r = 0; r < ranks; ++r)
    mask |= static_cast<uint32_t>(dev::load_once(args.is_token_in_rank + t * ranks + r) != 0) << r;
  return mask & wanted;
}

/// Lane r gets how many of the tokens first, first + step, ... of all lanes, below `end`, go to rank r. One warp.
template <int kBatch>
[[nodiscard]] DEEPEP_DEVICE int count_tokens(const DispatchArgs& args, int64_t first, int64_t step, int64_t end,
                                             uint32_t wanted) {
  using namespace dev;
  int count = 0;
#pragma unroll 1
  for (; ballot(first < end) != 0; first += kBatch * step) {
    uint32_t goes[kBatch];  // all asked for before the first is looked at
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      goes[i] = first + i * step < end ? destinations_of(args, first + i * step, wanted) : 0;
    for (int r = 0; r < args.group.num_ranks; ++r) {
      int with = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) with += popcount(ballot((goes[i] >> r) & 1u));
      if (lane() == r) count += with;
    }
  }
  return count;
}

/// place: into shared memory, how many tokens of this warp, and of its share of those before the block, go where.
DEEPEP_DEVICE void place(const DispatchArgs& args, const DispatchRole& role, const WarpTokens& mine) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> own(shared.own());
  SharedArray<int32_t> before(shared.before());
  const uint32_t wanted = wanted_ranks(role, args.group);
  const int own_count = count_tokens<1>(args, mine.begin + lane(), kWarpSize, mine.end, wanted);
  if (lane() < ranks) own.set(warp() * ranks + lane(), own_count);
  const int earlier = count_tokens<kPlaceBatch>(args, thread(), num_threads(), role.begin, wanted);
  if (lane() < ranks) before.set(warp() * ranks + lane(), earlier);
}

/// Lane r: the first of this warp's tokens for rank r has so many of this rank's before it. One warp, behind a block
/// barrier.
[[nodiscard]] DEEPEP_DEVICE int tokens_before(const DispatchArgs& args, const WarpTokens& mine) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> own(shared.own());
  SharedArray<int32_t> before(shared.before());
  int result = 0;
  for (int r = 0; r < ranks; ++r) {
    int share = 0;  // lane w adds what warp w has counted
    for (int w = lane(); w < num_warps(); w += kWarpSize) {
      share += before.get(w * ranks + r);
      // The warps of one token have all counted it.
      if (w < warp() - mine.part && w % mine.parts == 0) share += own.get(w * ranks + r);
    }
    const int sum = warp_sum(share);
    if (lane() == r) result = sum;
  }
  return result;
}

/// What is known of a token's way before its turn: for a cached call its row at rank r in lane r, or -1; else whether
/// it goes there.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE int32_t look_ahead(const DispatchArgs& args, int64_t t, bool mine) {
  if (!mine) return kCached ? -1 : 0;
  const int64_t at = t * args.group.num_ranks + dev::lane();
  return kCached ? dev::load_once(args.send_row + at) : dev::load_once(args.is_token_in_rank + at);
}

/// Lane r: which of the tokens [begin, begin + size) go to rank r, as bits. One warp.
[[nodiscard]] DEEPEP_DEVICE uint32_t going_of(const DispatchArgs& args, int64_t begin, int size, uint32_t wanted) {
  using namespace dev;
  const uint32_t goes = lane() < size ? destinations_of(args, begin + lane(), wanted) : 0;
  uint32_t going = 0;
  for (int r = 0; r < args.group.num_ranks; ++r) {
    const uint32_t with = ballot((goes >> r) & 1u);
    if (lane() == r) going = with;
  }
  return going;
}

/// A lane's next pieces of a row, those u with u * kWarpSize < pieces.
DEEPEP_DEVICE void read_row(const dev::Vec16* from, int pieces, dev::Vec16 (&v)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (u * dev::kWarpSize < pieces) v[u] = dev::load_once(from + u * dev::kWarpSize);
}

/// The beginning of a row, and its scales. `is_here`: of a warp's first row, on its way while the counts are.
struct HeldRow {
  dev::Vec16 pieces[kUnroll];
  Scales scales;
  bool is_here;
};

/// Warps that listen do not ask for their rows: what they hear would come behind them.
[[nodiscard]] DEEPEP_DEVICE HeldRow hold_first_row(const DispatchArgs& args, const WarpTokens& mine) {
  HeldRow first{};
  if (mine.begin >= mine.end || dev::warp() < listening_warps(args)) return first;
  first.is_here = true;
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int begin = chunks * mine.part / mine.parts + dev::lane();
  if (mine.part == 0 && args.num_scales > 0) first.scales = read_scales(args, mine.begin);
  const auto* row = reinterpret_cast<const dev::Vec16*>(args.x + mine.begin * args.row_bytes);
  read_row(row + begin, chunks * (mine.part + 1) / mine.parts - begin, first.pieces);
  return first;
}

/// write: a warp's tokens, or its part of one; a row is read once and stored to every destination of the role.
/// `ahead`: of the first token; `tokens_before` it, for rank r in lane r. Both were found while the counts travelled,
/// and the beginning of its row may be `held`.
template <bool kCached>
DEEPEP_DEVICE void write_rows(const DispatchArgs& args, const DispatchRole& role, const WarpTokens& mine,
                              int32_t ahead, int tokens_before, HeldRow& held) {
  using namespace dev;
  const Group& g = args.group;
  const int ranks = g.num_ranks;
  SharedArray<int32_t> counts(ExchangeShared{ranks}.counts());
  SharedArray<uint32_t> failed(ExchangeShared{ranks}.failed());
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };

  // Lane r speaks for rank r.
  const bool speaks = (wanted_ranks(role, g) >> lane()) & 1u;
  const int32_t first_row = speaks ? static_cast<int32_t>(layout::first_row_of_source(count, g.rank, lane())) : 0;
  const int32_t end_row = speaks ? first_row + count(g.rank, lane()) : 0;
  const uint64_t slot_x = speaks ? reinterpret_cast<uint64_t>(lent<Vec16>(args, lane(), layout::kSlotRows)) : 0;
  int32_t next_row = first_row + tokens_before;
  const bool trails = mine.part == 0 && args.num_scales > 0;  // what is written row by row
  const bool describes = !kCached && mine.part == 0;          // what is written for a group of rows
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int from = chunks * mine.part / mine.parts;
  const int end = chunks * (mine.part + 1) / mine.parts;
#pragma unroll 1
  for (int64_t first = mine.begin; first < mine.end; first += kWarpSize) {
    const int size = static_cast<int>(layout::min_of(mine.end - first, static_cast<int64_t>(kWarpSize)));
    // Bit i of lane r: token first + i goes to rank r. A cached call has the rows instead, one token's ahead.
    uint32_t going = ahead != 0 ? 1u : 0u;
    if (!kCached && mine.end - mine.begin > 1) going = going_of(args, first, size, wanted_ranks(role, g));
    // The warps of a block, each at another of its tokens: some store rows while others wait for these words.
    const int turn = warp() * size / kWarpSize;
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      const int64_t t = first + i;
      int32_t row = ahead;
      if (!kCached)
        row = ((going >> i) & 1u) ? next_row++ : -1;
      else if (t + 1 < mine.end)
        ahead = look_ahead<kCached>(args, t + 1, speaks);
      // More tokens for a rank than was told would run into another source's rows, or out of the slot.
      const bool excess = row >= end_row && row >= 0;
      if (excess)
        note_fault(g, Phase::kDisagreement, 1u << g.rank, static_cast<uint32_t>(end_row), static_cast<uint32_t>(row));
      if (ballot(excess) != 0 && lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      const uint32_t destinations = ballot(row >= 0 && !excess);
      const bool is_turn = describes && i == turn;
      Entry entry{};
      if (is_turn) entry = read_entry(args, first, size, lane());
      if (destinations != 0) {
        if (trails && !held.is_here) held.scales = read_scales(args, t);
        const uint64_t target = slot_x + static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes);
        const uint64_t source = reinterpret_cast<uint64_t>(args.x + t * args.row_bytes);
#pragma unroll 1
        for (int begin = from + lane(); begin < end + lane(); begin += kUnroll * kWarpSize) {
          const int pieces = end - begin;  // this lane's are those u with u * kWarpSize < pieces
          const uint64_t offset = sizeof(Vec16) * static_cast<uint32_t>(begin);
          const Vec16* from_row = reinterpret_cast<const Vec16*>(source + offset);
          if (!held.is_here) read_row(from_row, pieces, held.pieces);
          held.is_here = false;
#pragma unroll 1
          for (uint32_t left = destinations; left != 0; left &= left - 1) {
            Vec16* to = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(left)) + offset);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
              if (u * kWarpSize < pieces) store_streaming(to + u * kWarpSize, held.pieces[u]);
          }
        }
        for (uint32_t left = trails ? destinations : 0; left != 0; left &= left - 1) {
          const int d = lowest_bit(left);
          write_scales(args, held.scales, t, d, shuffle(row, d));
        }
      }
      held.is_here = false;
      if (!is_turn) continue;
      const int32_t group_row = next_row - going_before(going, i) - static_cast<int>((going >> i) & 1u);
      const TokenGroup group{first, size, first_bits(going, end_row - group_row), group_row};
      const bool keeps = speaks || (role.push && lane() < ranks && !is_live(g, lane()));
      keep_rows(args, group, keeps);
      write_metadata(args, group, entry);
    }
  }
}

/// Rows past the last received one carry no expert: what `num_worst_tokens` promises. The local blocks' part.
DEEPEP_DEVICE void pad_indices(const DispatchArgs& args, int part, int parts) {
  using namespace dev;
  const Group& g = args.group;
  SharedArray<int32_t> counts(ExchangeShared{g.num_ranks}.counts());
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const int64_t received = layout::first_row_of_source(count, g.num_ranks, g.rank);
  std::byte* idx = lent<std::byte>(args, g.rank, layout::kSlotIndices);
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
  const ExchangeShared shared{g.num_ranks};
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
  const layout::TokenSplit& split = role.push ? args.push_split : args.local_split;
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

/// Asks for the warp's first row while the counts travel.
DEEPEP_DEVICE void prefetch_row(const DispatchArgs& args, const WarpTokens& mine) {
  if (mine.begin >= mine.end) return;
  const int lines = static_cast<int>(args.row_bytes / layout::kLine);
  const int end = lines * (mine.part + 1) / mine.parts;
  for (int line = lines * mine.part / mine.parts + dev::lane(); line < end; line += dev::kWarpSize)
    dev::prefetch(args.x + mine.begin * args.row_bytes + line * layout::kLine);
}

/// A dispatch. kCached: along the routing of a handle; a kernel of its own, which is half as long.
template <bool kCached>
DEEPEP_DEVICE void dispatch(const DispatchArgs& args) {
  using namespace dev;
  const Group& g = args.group;
  const ExchangeShared shared{g.num_ranks};
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> unheard(shared.unheard());
  SharedArray<uint32_t> untold(shared.untold());
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->dispatch_epoch);
  const bool talks = block() == 0;
  const bool tells_host = args.host != nullptr && block() == (num_blocks() > 1 ? 1 : 0);

  if (thread() == 0) {
    failed.set(0, 0);
    unheard.set(0, 0);
    untold.set(0, 0);
  }
  sync_block();
  if (talks) tell<kCached>(args, epoch);
  const DispatchRole role = role_of_block(args);
  const WarpTokens mine = tokens_of_warp(role);
  // Of what does not depend on the counts, what is slow: first rows, where their tokens go, who goes before them.
  prefetch_row(args, mine);
  const bool speaks = mine.begin < mine.end && ((wanted_ranks(role, g) >> lane()) & 1u);
  const int32_t ahead = look_ahead<kCached>(args, mine.begin, speaks && !args.refused);
  int before = 0;
  if (!kCached && !args.refused) {
    place(args, role, mine);
    sync_block();
    before = tokens_before(args, mine);
  }
  HeldRow first = hold_first_row(args, mine);
  const uint32_t why = hear<kCached>(args, epoch, deadline);  // on a rank that refused, for it disagrees with itself
  if (tells_host) tell_host(args, why, epoch, deadline);
  if (why == 0) {
    write_rows<kCached>(args, role, mine, ahead, before, first);
    if (role.push) publish_rows(g, block() - first_push_block(args), epoch);
    if (!kCached && talks) keep_counts(args);
    if (role.local && args.num_worst_tokens > 0) pad_indices(args, block(), args.local_blocks);
    if (block() == num_blocks() - 1) await_rows(g, epoch, deadline);
  } else if (!kCached) {
    leave_empty_handle(args, role);
  }
  if (talks) lend_staging(g, load(&g.state->combine_epoch));
  if (thread() == num_threads() - 1) have_read_epoch(g, &g.state->dispatch_epoch, epoch);
  sync_block();
  if (thread() == 0 && failed.get(0) != 0) hand_over_faults(g, Operation::kDispatch);
}

DEEPEP_KERNEL(dispatch_kernel, DispatchArgs, kDispatchThreads) { dispatch<false>(args); }
DEEPEP_KERNEL(dispatch_cached_kernel, DispatchArgs, kDispatchThreads) { dispatch<true>(args); }

}  // namespace deepep::kernels
