// The fields of a row, which travel with its bytes: scales, source token, top-k indices and weights.
//
// Scales are many: a row's own are written right after it. Of the rest a row has a few bytes, and a store for
// each would leave most of a warp's lanes idle. At one destination the rows of a warp's tokens follow each
// other; so they are written for up to 32 tokens together, and what is stored is one stretch of each array.
#pragma once

#include "kernels/dispatch/metadata.hpp"
#include "layout/placement.hpp"

namespace deepep::kernels {

/// A row's scales, a piece in each lane's hands: two neighbours, so that they are stored at once, or where rows
/// may begin between two 8-byte words, two that are a warp's width apart.
struct Scales {
  static constexpr int kHeld = 2;  // further ones are read when they are written
  uint32_t scale[kHeld];
};

[[nodiscard]] DEEPEP_DEVICE bool has_paired_scales(const DispatchArgs& args) {
  return args.num_scales % 2 == 0;
}

[[nodiscard]] DEEPEP_DEVICE uint32_t scale_of(const DispatchArgs& args, int64_t t, int i) {
  return dev::load_once(args.scales + t * args.scale_strides.row + i * args.scale_strides.column);
}

/// Of token t, loaded before the row so that they arrive with it. One warp.
[[nodiscard]] DEEPEP_DEVICE Scales read_scales(const DispatchArgs& args, int64_t t) {
  using namespace dev;
  Scales s{};
  const bool paired = has_paired_scales(args);
  const int first = paired ? 2 * lane() : lane();
  const int second = first + (paired ? 1 : kWarpSize);
  if (first < args.num_scales) s.scale[0] = scale_of(args, t, first);
  if (second < args.num_scales) s.scale[1] = scale_of(args, t, second);
  return s;
}

/// The same to row `row` at rank d.
DEEPEP_DEVICE void write_scales(const DispatchArgs& args, const Scales& s, int64_t t, int d, int64_t row) {
  using namespace dev;
  uint32_t* to = recv_array<uint32_t>(args, d, layout::kSlotScales) + row * args.num_scales;
  if (has_paired_scales(args)) {
    const uint64_t pair = static_cast<uint64_t>(s.scale[1]) << 32 | s.scale[0];
    if (2 * lane() < args.num_scales) store(reinterpret_cast<uint64_t*>(to) + lane(), pair);
  } else {
    if (lane() < args.num_scales) store(to + lane(), s.scale[0]);
    if (lane() + kWarpSize < args.num_scales) store(to + lane() + kWarpSize, s.scale[1]);
  }
#pragma unroll 1
  for (int i = lane() + Scales::kHeld * kWarpSize; i < args.num_scales; i += kWarpSize)
    store(to + i, scale_of(args, t, i));
}

/// Up to 32 tokens of a warp that follow each other; lane r holds what concerns rank r.
struct TokenGroup {
  int64_t begin;  // tokens [begin, begin + size)
  int size;
  uint32_t going;     // bit i: token begin + i goes there
  int32_t first_row;  // of the first that goes; the rows of the others follow
};

/// The lowest `count` of the bits set.
[[nodiscard]] DEEPEP_DEVICE uint32_t first_bits(uint32_t bits, int count) {
  if (dev::popcount(bits) <= count) return bits;
  uint32_t rest = bits;
#pragma unroll 1
  for (int i = 0; i < count; ++i) rest &= rest - 1;
  return bits & ~rest;
}

/// The number of tokens before the group's i-th that go, by the bits of a rank. i < 32.
[[nodiscard]] DEEPEP_DEVICE int going_before(uint32_t going, int i) {
  return dev::popcount(going & ((1u << i) - 1));
}

/// Walks the rows of a [group.size, width] array, 32 elements of it at a time, one a lane; without a division a
/// step. width <= 32.
struct LaneInRows {
  int width;
  int row;
  int column;
  int rows_a_step;
  int columns_a_step;

  [[nodiscard]] DEEPEP_DEVICE static LaneInRows at_start(int width, int rows) {
    using dev::kWarpSize;
    // One row: where few tokens are dealt to many warps, it is what stands behind the row's bytes.
    if (rows == 1)
      return {.width = width,
              .row = dev::lane() < width ? 0 : 1,
              .column = dev::lane(),
              .rows_a_step = 1,
              .columns_a_step = 0};
    return {.width = width,
            .row = dev::lane() / width,
            .column = dev::lane() % width,
            .rows_a_step = kWarpSize / width,
            .columns_a_step = kWarpSize % width};
  }
  DEEPEP_DEVICE void advance() {
    row += rows_a_step;
    column += columns_a_step;
    if (column < width) return;
    column -= width;
    ++row;
  }
};

/// The group's rows at every rank into the handle, -1 for none; `saves`: lane r, whether rank r concerns this
/// warp.
DEEPEP_DEVICE void save_send_rows(const DispatchArgs& args, const TokenGroup& group, bool saves) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const uint32_t saved = ballot(saves);
  int32_t* to = args.send_row + group.begin * ranks;
  LaneInRows at = LaneInRows::at_start(ranks, group.size);
#pragma unroll 1
  for (int begin = 0; begin < group.size * ranks; begin += kWarpSize, at.advance()) {
    const uint32_t going = shuffle(group.going, at.column);
    const int32_t first_row = shuffle(group.first_row, at.column);
    if (at.row >= group.size || !((saved >> at.column) & 1u)) continue;
    const bool goes = (going >> at.row) & 1u;
    store(to + begin + lane(), goes ? first_row + going_before(going, at.row) : -1);
  }
}

/// The source token of each of the group's rows, to every rank of `destinations`.
DEEPEP_DEVICE void write_sources(const DispatchArgs& args, const TokenGroup& group, uint32_t destinations) {
  using namespace dev;
#pragma unroll 1
  for (uint32_t left = destinations; left != 0; left &= left - 1) {
    const int d = lowest_bit(left);
    const uint32_t going = shuffle(group.going, d);
    const int32_t row = shuffle(group.first_row, d) + going_before(going, lane());
    int32_t* to = recv_array<int32_t>(args, d, layout::kSlotSource);
    if (((going >> lane()) & 1u)) store(to + row, static_cast<int32_t>(group.begin + lane()));
  }
}

/// A top-k entry. An index of four bytes has no sign here, since to extend it one has to wait for it; -1 is no
/// expert either way.
struct Entry {
  int64_t index;
  uint32_t weight;
};

/// Entry i of the tokens [begin, begin + size), one token's behind the other's; -1 past the last.
[[nodiscard]] DEEPEP_DEVICE Entry read_entry(const DispatchArgs& args, int64_t begin, int size, int i) {
  using namespace dev;
  if (i >= size * args.num_topk) return {-1, 0};
  const int64_t from = begin * args.num_topk + i;
  const int64_t index = args.index_bytes == 8 ? load_once(static_cast<const int64_t*>(args.topk_idx) + from)
                                              : load_once(static_cast<const uint32_t*>(args.topk_idx) + from);
  return {index, load_once(args.topk_weights + from)};
}

/// Indices and weights to every rank of `destinations`, as it sees them: its own experts', -1 and 0 for
/// others'. `entry`: this lane's first; `first_rank`: what lane 0 stands for, of `num_ranks` with experts.
DEEPEP_DEVICE void write_entries(const DispatchArgs& args, const TokenGroup& group, uint32_t destinations,
                                 Entry entry, int first_rank, int num_ranks) {
  using namespace dev;
  if (args.num_topk == 0 || destinations == 0) return;
  const layout::Placement placement(args.num_local_experts * num_ranks, num_ranks, num_ranks);
  LaneInRows at = LaneInRows::at_start(args.num_topk, group.size);
#pragma unroll 1
  for (int begin = 0; begin < group.size * args.num_topk; begin += kWarpSize, at.advance()) {
    const Entry next = read_entry(args, group.begin, group.size, begin + kWarpSize + lane());
    const int32_t expert = static_cast<int32_t>(entry.index);
    const int owner = placement.is_expert(entry.index) ? placement.rank_of_expert(expert) : -1;
    const int32_t local = expert - placement.first_expert_of_rank(owner);  // at its owner
#pragma unroll 1
    for (uint32_t left = destinations; left != 0; left &= left - 1) {
      const int d = lowest_bit(left);
      const uint32_t going = shuffle(group.going, d);
      const int32_t first_row = shuffle(group.first_row, d);
      if (at.row >= group.size || !((going >> at.row) & 1u)) continue;
      const int64_t to =
          static_cast<int64_t>(first_row + going_before(going, at.row)) * args.num_topk + at.column;
      const int32_t seen = owner == first_rank + d ? local : -1;
      if (args.index_bytes == 8)
        store(recv_array<int64_t>(args, d, layout::kSlotIndices) + to, static_cast<int64_t>(seen));
      else
        store(recv_array<int32_t>(args, d, layout::kSlotIndices) + to, seen);
      store(recv_array<uint32_t>(args, d, layout::kSlotWeights) + to,
            owner == first_rank + d ? entry.weight : 0u);
    }
    entry = next;
  }
}

/// Source tokens, indices and weights of all the group's rows. `entry`: this lane's first; `first_rank`,
/// `num_ranks`: as of write_entries.
DEEPEP_DEVICE void write_fields(const DispatchArgs& args, const TokenGroup& group, const Entry& entry,
                                int first_rank, int num_ranks) {
  const uint32_t destinations = dev::ballot(group.going != 0);
  write_sources(args, group, destinations);
  write_entries(args, group, destinations, entry, first_rank, num_ranks);
}
DEEPEP_DEVICE void write_fields(const DispatchArgs& args, const TokenGroup& group, const Entry& entry) {
  write_fields(args, group, entry, 0, args.group.num_ranks);
}

}  // namespace deepep::kernels
