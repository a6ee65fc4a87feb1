// Rows in LogFMT, in a warp's registers and in memory.
//
// A row is worked on by units of four groups, 512 channels: a lane has two pieces of eight channels, a warp's
// width apart; so sixteen lanes have a group. One or two units are a chunk, which is encoded as a whole or not
// at all. What travels of a unit lies where it would as it is, in the row's own place: encoded, the three words
// with the first pieces' codes, lane by lane, word by word, the third with the rest of both; then the other two
// words of those lanes that have a second piece. The metadata of all groups lie elsewhere, side by side.
#pragma once

#include "kernels/low_latency/logfmt.hpp"
#include "kernels/low_latency/sum_rows.hpp"

namespace deepep::kernels {

inline constexpr int kGroupPieces = layout::kLogfmtGroup / 8;
inline constexpr int kUnitGroups = 4;
inline constexpr int kUnitPieces = kUnitGroups * kGroupPieces;  // 64, two a lane
inline constexpr int kChunkUnits = 2;                           // at most

/// How a row falls into chunks and units.
struct LogfmtRow {
  int pieces;
  int chunk_units;  // of a chunk: 1 or 2; the last chunk, and the last unit, may be shorter

  [[nodiscard]] DEEPEP_DEVICE static LogfmtRow of(int hidden) {
    return {hidden / 8, hidden % (kChunkUnits * kUnitGroups * layout::kLogfmtGroup) == 0 ? kChunkUnits : 1};
  }
  [[nodiscard]] DEEPEP_DEVICE int units() const { return (pieces + kUnitPieces - 1) / kUnitPieces; }
  [[nodiscard]] DEEPEP_DEVICE int chunks() const { return (units() + chunk_units - 1) / chunk_units; }
  /// Pieces from this lane's first one of a unit on: it has those u with u * kWarpSize < left.
  [[nodiscard]] DEEPEP_DEVICE int left(int unit) const { return pieces - unit * kUnitPieces - dev::lane(); }
  /// Groups of the chunk that begins with a unit.
  [[nodiscard]] DEEPEP_DEVICE int groups(int unit) const {
    return layout::min_of(chunk_units * kUnitPieces, pieces - unit * kUnitPieces) / kGroupPieces;
  }
};

/// This lane's words of an encoded unit.
struct LogfmtWords {
  uint32_t* words;
  int first;   // lanes with a piece
  int second;  // with two

  [[nodiscard]] DEEPEP_DEVICE static LogfmtWords at(std::byte* row, const LogfmtRow& shape, int unit) {
    using namespace dev;
    const int left = shape.pieces - unit * kUnitPieces;
    return {reinterpret_cast<uint32_t*>(row + int64_t{16} * unit * kUnitPieces),
            layout::min_of(left, kWarpSize), layout::max_of(layout::min_of(left - kWarpSize, kWarpSize), 0)};
  }
  [[nodiscard]] DEEPEP_DEVICE uint32_t* word(int i) const {
    return words + (i < 3 ? i * first : 3 * first + (i - 3) * second) + dev::lane();
  }
};

/// The larger of each half.
[[nodiscard]] DEEPEP_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  return layout::max_of(a & 0xffffu, b & 0xffffu) | layout::max_of(a >> 16, b >> 16) << 16;
}

/// The metadata of the group that a piece belongs to. All lanes; of one without a piece, those of no channel.
[[nodiscard]] DEEPEP_DEVICE LogfmtMeta meta_of(const dev::Vec16& piece, bool is_there) {
  using namespace dev;
  constexpr uint32_t kMost = 0x7fffu;  // from which the smallest is taken, to be the largest
  uint32_t ends = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = piece.w[i] & kMost, high = (piece.w[i] >> 16) & kMost;
    ends = larger_halves(ends, layout::max_of(low, high) | (kMost - layout::min_of(low, high)) << 16);
  }
  if (!is_there) ends = 0;
#pragma unroll
  for (int distance = 1; distance < kGroupPieces; distance *= 2)
    ends = larger_halves(ends, shuffle(ends, lane() ^ distance));
  return {(ends & 0xffffu) | (kMost - (ends >> 16)) << 16};
}

/// A lane's pieces of a chunk, as bf16.
struct LogfmtChunk {
  dev::Vec16 piece[kChunkUnits][kSumUnroll];
};

/// Where a row in LogFMT lies.
struct LogfmtPlace {
  std::byte* row;
  uint32_t* metadata;
};

/// This lane's words of a unit of a row there.
[[nodiscard]] DEEPEP_DEVICE LogfmtWords words_of(const LogfmtPlace& to, const LogfmtRow& shape, int unit) {
  return LogfmtWords::at(to.row, shape, unit);
}

/// What the chunk that begins with a unit takes besides if it goes as it is: nothing here. One warp.
struct LogfmtRest {};
[[nodiscard]] DEEPEP_DEVICE LogfmtRest rest_of(const LogfmtPlace&, const LogfmtRow&, int, bool) { return {}; }

/// A unit as it is. One warp.
DEEPEP_DEVICE void store_raw(const LogfmtPlace& to, const LogfmtRest&, const LogfmtRow& shape, int unit,
                              const dev::Vec16 (&piece)[kSumUnroll]) {
  using namespace dev;
  const int left = shape.left(unit);
  Vec16* pieces = reinterpret_cast<Vec16*>(to.row) + unit * kUnitPieces + lane();
#pragma unroll
  for (int u = 0; u < kSumUnroll; ++u)
    if (u * kWarpSize < left) store_streaming(pieces + u * kWarpSize, piece[u]);
}

/// The chunk that begins with a unit, to where it goes: encoded if all of its groups can be. One warp.
template <class Place>
DEEPEP_DEVICE void store_chunk(const Place& to, const LogfmtRow& shape, int unit,
                               const LogfmtChunk& chunk) {
  using namespace dev;
  const int mine = lane() % (kChunkUnits * kUnitGroups);  // the group that this lane has the metadata of
  LogfmtMeta meta{0};
#pragma unroll
  for (int h = 0; h < kChunkUnits; ++h)
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const LogfmtMeta of_piece =
          meta_of(chunk.piece[h][u], h < shape.chunk_units && shape.left(unit + h) > u * kWarpSize);
      const uint32_t word = shuffle(of_piece.word, kGroupPieces * (mine % 2));
      if (mine / 2 == h * kSumUnroll + u) meta.word = word;
    }
  const int groups = shape.groups(unit);
  const bool is_encoded = ballot(mine < groups && !meta.is_good()) == 0;
  if (lane() < groups) store(to.metadata + unit * kUnitGroups + lane(), meta.word);
  const LogfmtEncoder group = LogfmtEncoder::of(meta);
  const auto rest = rest_of(to, shape, unit, is_encoded);
#pragma unroll
  for (int h = 0; h < kChunkUnits; ++h) {
    if (h >= shape.chunk_units) continue;
    const int left = shape.left(unit + h);
    if (!is_encoded) {
      store_raw(to, rest, shape, unit + h, chunk.piece[h]);
      continue;
    }
    LogfmtCodes codes[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int from = (h * kSumUnroll + u) * 2 + lane() / kGroupPieces;
      codes[u] = encode(
          {shuffle(group.low, from), shuffle(group.steps_of_unit, from), shuffle(group.first, from)},
          chunk.piece[h][u]);
    }
    const LogfmtWords words = words_of(to, shape, unit + h);
    if (left > 0) {
      store(words.word(0), codes[0].low);
      store(words.word(1), codes[0].high);
      store(words.word(2), codes[0].rest | codes[1].rest << 16);
    }
    if (left > kWarpSize) {
      store(words.word(3), codes[1].low);
      store(words.word(4), codes[1].high);
    }
  }
}

inline constexpr int kLogfmtRows = 4;  // that a warp reads at once: a lane has the metadata of one's group

/// Rows in LogFMT to be summed. Lane i: where the i-th one's metadata lie.
struct LogfmtRows {
  SumRows rows;
  uint64_t metadata;
};

/// This lane's words of a unit of the row of lane `number`.
[[nodiscard]] DEEPEP_DEVICE LogfmtWords words_of(const LogfmtRows& given, const LogfmtRow& shape, int number,
                                                 int unit) {
  return LogfmtWords::at(reinterpret_cast<std::byte*>(dev::shuffle(given.rows.address, number)), shape, unit);
}

/// This lane's pieces of a unit that is there as it is. `piece`: its words, read as if it were encoded.
DEEPEP_DEVICE void load_raw(const LogfmtRows& given, const LogfmtRow& shape, int number, int unit,
                             dev::Vec16 (&piece)[kSumUnroll]) {
  using namespace dev;
  const int left = shape.left(unit);
  const Vec16* pieces = reinterpret_cast<const Vec16*>(shuffle(given.rows.address, number));
#pragma unroll
  for (int u = 0; u < kSumUnroll; ++u)
    if (u * kWarpSize < left) piece[u] = load_streaming(pieces + unit * kUnitPieces + lane() + u * kWarpSize);
}

/// Adds a piece that was encoded.
template <bool kWeighted>
DEEPEP_DEVICE void add_codes(float (&sum)[8], const LogfmtDecoder& group, const LogfmtCodes& codes,
                             float weight) {
  using namespace dev;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float channel = group.value(code_of(codes, i));
    sum[i] = add_rounded(sum[i], kWeighted ? mul_rounded(channel, weight) : channel);
  }
}

/// The sums of a lane's pieces of a unit. One warp.
template <bool kWeighted, class Rows>
[[nodiscard]] DEEPEP_DEVICE LaneSums sum_unit(const Rows& given, const LogfmtRow& shape, int unit) {
  using namespace dev;
  constexpr int kGroups = kChunkUnits * kUnitGroups;  // of a chunk; as many lanes have a row's
  const int half = shape.chunk_units == 1 ? 0 : unit % kChunkUnits;
  const int first = unit - half, left = shape.left(unit), groups = shape.groups(first);
  LaneSums sum = begin_sums(given.rows.rows);
#pragma unroll 1
  for (uint32_t rows = given.rows.rows; rows != 0;) {
    uint32_t at_hand = rows;
    const int count = layout::min_of(popcount(rows), kLogfmtRows);
    int of_lane = lowest_bit(rows);
#pragma unroll
    for (int i = 0; i < kLogfmtRows; ++i) {
      if (i >= count) continue;
      if (lane() / kGroups == i) of_lane = lowest_bit(rows);
      rows &= rows - 1;
    }
    const uint64_t metadata = shuffle(given.metadata, of_lane);
    const bool has_group = lane() / kGroups < count && lane() % kGroups < groups;
    LogfmtMeta meta{0};
    if (has_group)
      meta.word = load(reinterpret_cast<const uint32_t*>(metadata) + first * kUnitGroups + lane() % kGroups);
    // As if all were encoded, which the metadata will say: they are on their way.
    Vec16 v[kLogfmtRows][kSumUnroll] = {};
    float weight[kLogfmtRows] = {};
    uint32_t to_read = at_hand;
#pragma unroll
    for (int i = 0; i < kLogfmtRows; ++i) {
      if (i >= count) continue;
      const int number = lowest_bit(to_read);
      to_read &= to_read - 1;
      const LogfmtWords words = words_of(given, shape, number, unit);
      if (kWeighted) weight[i] = shuffle(given.rows.weight, number);
      if (left > 0) {
        v[i][0].w[0] = load(words.word(0));
        v[i][0].w[1] = load(words.word(1));
        v[i][0].w[2] = load(words.word(2));
      }
      if (left > kWarpSize) {
        v[i][1].w[0] = load(words.word(3));
        v[i][1].w[1] = load(words.word(4));
      }
    }
    const uint32_t raw = ballot(has_group && !meta.is_good());
    const LogfmtDecoder mine = LogfmtDecoder::of(meta);
#pragma unroll
    for (int i = 0; i < kLogfmtRows; ++i) {
      if (i >= count) continue;
      const int number = lowest_bit(at_hand);
      at_hand &= at_hand - 1;
      const bool is_encoded = ((raw >> (kGroups * i)) & 0xffu) == 0;
      if (!is_encoded) load_raw(given, shape, number, unit, v[i]);
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) {
        const int from = kGroups * i + half * kUnitGroups + 2 * u + lane() / kGroupPieces;
        const LogfmtDecoder group{shuffle(mine.low, from), shuffle(mine.step, from)};
        const uint32_t rest = u == 0 ? v[i][0].w[2] & 0xffffu : v[i][0].w[2] >> 16;
        if (is_encoded)
          add_codes<kWeighted>(sum.of[u], group, {v[i][u].w[0], v[i][u].w[1], rest}, weight[i]);
        else
          add_channels<kWeighted>(sum.of[u], v[i][u], weight[i]);
      }
    }
  }
  return sum;
}

/// The units [from, end) of the sum, to `out`, as bf16.
template <bool kWeighted, class Rows>
DEEPEP_DEVICE void sum_logfmt_rows(dev::Vec16* out, const Rows& given, const LogfmtRow& shape, int from,
                                   int end) {
  using namespace dev;
#pragma unroll 1
  for (int unit = from; unit < end; ++unit) {
    const LaneSums sum = sum_unit<kWeighted>(given, shape, unit);
    const int left = shape.left(unit);
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u)
      if (u * kWarpSize < left)
        store_streaming(out + unit * kUnitPieces + lane() + u * kWarpSize, round_channels(sum.of[u]));
  }
}

}  // namespace deepep::kernels
