// Rows to their final places: each is read once, and stored at every rank that it goes to.
#pragma once

#include "kernels/dispatch/place.hpp"
#include "kernels/dispatch/row_fields.hpp"
#include "kernels/dispatch/streams.hpp"

namespace deepep::kernels {

inline constexpr int kUnroll = 14;  // 16-byte accesses a lane has in flight: 7 KiB of a row a warp

/// Lane r: which of the tokens [begin, begin + size) go to rank r, as bits. One warp.
template <DispatchMode kMode>
[[nodiscard]] DEEPEP_DEVICE uint32_t going_of(const DispatchArgs& args, int64_t begin, int size,
                                              uint32_t wanted) {
  using namespace dev;
  return by_rank(args.group.num_ranks,
                 lane() < size ? destinations_of<kMode>(args, begin + lane(), wanted) : 0);
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

/// Warps that poll load no rows before: what they poll would come behind them.
[[nodiscard]] DEEPEP_DEVICE HeldRow read_first_row(const DispatchCall& call, const WarpShare& share) {
  const DispatchArgs& args = call.args;
  const WarpTokens& mine = share.mine;
  HeldRow first{};
  if (mine.begin >= mine.end || dev::warp() < polling_warps(args)) return first;
  first.is_here = true;
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int begin = chunks * mine.part / mine.parts + dev::lane();
  if (mine.part == 0 && args.num_scales > 0) first.scales = read_scales(args, mine.begin);
  const auto* row = reinterpret_cast<const dev::Vec16*>(args.x + mine.begin * args.row_bytes);
  read_row(row + begin, chunks * (mine.part + 1) / mine.parts - begin, first.pieces);
  return first;
}

/// The 16-byte pieces [from, end) of the row at `source`, read once and stored at every destination; `target`:
/// of lane r, the row's place at rank r. One warp.
DEEPEP_DEVICE void store_row(uint64_t source, uint64_t target, int from, int end, uint32_t destinations,
                             HeldRow& held) {
  using namespace dev;
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
}

/// A warp's tokens, or its part of one; a row is read once and stored to every destination of the role. What is
/// known of the `first_token` was found while the metadata travelled, and the beginning of its row may be
/// `held`.
template <DispatchMode kMode>
DEEPEP_DEVICE void write_rows(const DispatchCall& call, const WarpShare& share, const FirstToken& first_token,
                              HeldRow& held) {
  using namespace dev;
  constexpr bool kCached = kMode == DispatchMode::kCached;
  constexpr bool kTopk = finds_ranks(kMode);
  constexpr bool kExpanded = kMode == DispatchMode::kExpanded;
  const DispatchArgs& args = call.args;
  const DispatchRole& role = share.role;
  const WarpTokens& mine = share.mine;
  const Group& g = call.g;
  enter(call.lines, role.push ? Step::kPushRows : Step::kLocalRows);
  int32_t ahead = first_token.route;
  const int ranks = g.num_ranks;
  SharedArray<int32_t> counts(MetadataShared{ranks}.counts());
  SharedArray<uint32_t> failed(MetadataShared{ranks}.failed());
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };

  // Lane r handles rank r.
  const bool handles = (wanted_ranks(role, g) >> lane()) & 1u;
  const int32_t first_row =
      handles ? static_cast<int32_t>(layout::first_row_of_source(count, g.rank, lane())) : 0;
  const int32_t end_row = handles ? first_row + count(g.rank, lane()) : 0;
  const uint64_t slot_x =
      handles ? reinterpret_cast<uint64_t>(recv_array<Vec16>(args, lane(), layout::kSlotRows)) : 0;
  int32_t next_row = first_row + first_token.before;
  const int part = kExpanded ? 0 : mine.part;
  const int parts = kExpanded ? 1 : mine.parts;
  const bool trails = part == 0 && args.num_scales > 0;  // what is written row by row
  const bool has_fields = !kCached && part == 0;         // what is written for a group of rows
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int from = chunks * part / parts;
  const int end = chunks * (part + 1) / parts;
#pragma unroll 1
  for (int64_t first = mine.begin; first < mine.end; first += kWarpSize) {
    const int size = static_cast<int>(layout::min_of(mine.end - first, static_cast<int64_t>(kWarpSize)));
    // Bit i of lane r: token first + i goes to rank r. A cached call has the rows instead, one token's ahead.
    uint32_t going = ahead != 0 ? 1u : 0u;
    if (kTopk && first == mine.begin)
      going = handles ? static_cast<uint32_t>(first_token.route) : 0u;
    else if (!kCached && mine.end - mine.begin > 1)
      going = going_of<kMode>(args, first, size, wanted_ranks(role, g));
    // The warps of a block, each at another of its tokens: some store rows while others wait for these words.
    // Where rows are spread as they come, a row's are there before it is said to be.
    const int turn = kExpanded ? 0 : warp() * size / kWarpSize;
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      const int64_t t = first + i;
      int32_t row = ahead;
      if (!kCached)
        row = ((going >> i) & 1u) ? next_row++ : -1;
      else if (t + 1 < mine.end)
        ahead = look_up_route<kCached>(args, t + 1, handles);
      // More tokens for a rank than was posted would run into another source's rows, or out of the slot.
      const bool excess = row >= end_row && row >= 0;
      if (excess)
        note_fault(g, Phase::kDisagreement, 1u << g.rank, static_cast<uint32_t>(end_row),
                   static_cast<uint32_t>(row));
      if (ballot(excess) != 0 && lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
      const uint32_t destinations = ballot(row >= 0 && !excess);
      const bool is_turn = has_fields && i == turn;
      Entry entry{};
      if (is_turn) entry = read_entry(args, first, size, lane());
      if (destinations != 0) {
        if (trails && !held.is_here) held.scales = read_scales(args, t);
        const uint64_t target = slot_x + static_cast<uint64_t>(row) * static_cast<uint64_t>(args.row_bytes);
        const uint64_t source = reinterpret_cast<uint64_t>(args.x + t * args.row_bytes);
        if constexpr (kExpanded)
          copy_row<false>(source, target, chunks, destinations);
        else
          store_row(source, target, from, end, destinations, held);
        for (uint32_t left = trails ? destinations : 0; left != 0; left &= left - 1) {
          const int d = lowest_bit(left);
          write_scales(args, held.scales, t, d, shuffle(row, d));
        }
      }
      held.is_here = false;
      if (is_turn) {
        const int32_t group_row = next_row - going_before(going, i) - static_cast<int>((going >> i) & 1u);
        const TokenGroup group{first, size, first_bits(going, end_row - group_row), group_row};
        const bool saves = handles || (role.push && lane() < ranks && !is_live(g, lane()));
        save_send_rows(args, group, saves);
        write_fields(args, group, entry);
        if constexpr (kExpanded) write_places(call, group);
      }
      if constexpr (kExpanded)
        if (role.push)
          publish_progress(call, static_cast<uint32_t>(next_row) | (t + 1 == mine.end ? kFinished : 0u));
    }
  }
}

}  // namespace deepep::kernels
