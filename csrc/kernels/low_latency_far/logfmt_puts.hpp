// Rows in LogFMT that puts carry (layout::FarLogfmtRow): what goes encoded takes ten sixteenths of the bytes,
// and units that go as they are have the rest behind all rows, in the order in which warps come to them. Rows
// to and from ranks of this domain lie as inside one.
#pragma once

#include "kernels/low_latency_far/combine_rows.hpp"

namespace deepep::kernels {

/// Where a row goes. One that stays in the domain has no rests.
struct FarLogfmtPlace : LogfmtPlace {  // for a far rank: its codes, and the words before them
  layout::FarLogfmtRow lies;
  uint32_t* rests;   // those of the put, counted
  std::byte* behind;  // where they lie; null: the row stays
};

/// The rests of a chunk. Lane-uniform.
struct FarLogfmtRest {
  uint32_t first;
};

[[nodiscard]] DEEPEP_DEVICE LogfmtWords packed_words(std::byte* codes, const LogfmtRow& shape, int unit) {
  using namespace dev;
  const int left = shape.pieces - unit * kUnitPieces;
  return {reinterpret_cast<uint32_t*>(codes + int64_t{unit} * layout::FarLogfmtRow::kUnitBytes),
          layout::min_of(left, kWarpSize), layout::max_of(layout::min_of(left - kWarpSize, kWarpSize), 0)};
}

/// This lane's words of a rest: the fourth of its first piece, the third and the fourth of its second.
struct RestWords {
  uint32_t* words;
  int first;   // lanes that have one of a row's first unit,
  int second;  // and two more

  [[nodiscard]] DEEPEP_DEVICE static RestWords at(std::byte* behind, const layout::FarLogfmtRow& lies,
                                                  uint32_t number) {
    return {reinterpret_cast<uint32_t*>(behind + number * lies.rest_bytes()), lies.first_pieces(),
            lies.second_pieces()};
  }
  [[nodiscard]] DEEPEP_DEVICE uint32_t* word(int i) const {
    return words + (i == 0 ? 0 : first + (i - 1) * second) + dev::lane();
  }
};

[[nodiscard]] DEEPEP_DEVICE LogfmtWords words_of(const FarLogfmtPlace& to, const LogfmtRow& shape, int unit) {
  const LogfmtPlace& near = to;
  return to.behind == nullptr ? words_of(near, shape, unit) : packed_words(to.row, shape, unit);
}

/// One warp. Which rests the chunk's units have is written in any case: nothing leaves that nobody wrote.
[[nodiscard]] DEEPEP_DEVICE FarLogfmtRest rest_of(const FarLogfmtPlace& to, const LogfmtRow& shape, int unit,
                                                  bool is_encoded) {
  using namespace dev;
  if (to.behind == nullptr) return {0};
  const int units = layout::min_of(shape.chunk_units, shape.units() - unit);
  uint32_t first = 0;
  if (lane() == 0 && !is_encoded)
    first = fetch_add<relaxed, gpu_scope>(to.rests, static_cast<uint32_t>(units));
  first = shuffle(first, 0);
  auto* words = reinterpret_cast<uint32_t*>(to.row - to.lies.codes() + to.lies.rest_of(unit));
  if (lane() < units) store(words + lane(), first + static_cast<uint32_t>(lane()));
  return {first - static_cast<uint32_t>(unit)};
}

DEEPEP_DEVICE void store_raw(const FarLogfmtPlace& to, const FarLogfmtRest& rest, const LogfmtRow& shape,
                             int unit, const dev::Vec16 (&piece)[kSumUnroll]) {
  using namespace dev;
  const LogfmtPlace& near = to;
  if (to.behind == nullptr) return store_raw(near, LogfmtRest{}, shape, unit, piece);
  const int left = shape.left(unit);
  const LogfmtWords words = words_of(to, shape, unit);
  const RestWords others = RestWords::at(to.behind, to.lies, rest.first + static_cast<uint32_t>(unit));
  if (left > 0)
    for (int i = 0; i < 3; ++i) store(words.word(i), piece[0].w[i]);
  if (left > kWarpSize)
    for (int i = 0; i < 2; ++i) store(words.word(3 + i), piece[1].w[i]);
  // A last unit is shorter than a rest, of which all is put.
  if (lane() < others.first) store(others.word(0), left > 0 ? piece[0].w[3] : 0u);
  if (lane() < others.second)
    for (int i = 0; i < 2; ++i) store(others.word(1 + i), left > kWarpSize ? piece[1].w[2 + i] : 0u);
}

/// Row `number` of those that go back to a rank.
[[nodiscard]] DEEPEP_DEVICE FarLogfmtPlace packed_to(const FarCombineCall& call, int rank, int number) {
  const layout::FarLogfmtRow lies{call.args.hidden};
  std::byte* rows = leaving_for<std::byte>(call.far, call.turn, rank, call.far.slots.rows());
  std::byte* row = rows + number * lies.bytes();
  return {{row + lies.codes(), reinterpret_cast<uint32_t*>(row)},
          lies,
          call.far.state->rests + rank,
          rows + rows_to(call, rank) * lies.bytes()};
}

[[nodiscard]] DEEPEP_DEVICE FarLogfmtPlace encoded_to(const FarCombineCall& call, const MessageAt& where) {
  if (is_mapped(call, where.source)) return {encoded_to(call.near(), where), {}, nullptr, nullptr};
  return packed_to(call, where.source, number_of_came(call, where.source, where.token));
}
[[nodiscard]] DEEPEP_DEVICE FarLogfmtPlace encoded_to(const FarCombineCall& call, const MessageAt& where,
                                                      uint32_t rows, int k) {
  if (is_mapped(call, where.source)) return {encoded_to(call.near(), where, rows, k), {}, nullptr, nullptr};
  const int before = dev::popcount(rows & ((1u << k) - 1u));
  return packed_to(call, where.source, number_of_came(call, where.source, where.token) + before);
}

/// Rows to be summed, some of which came by puts. Lane i: where the rests of the i-th one's put lie, or 0.
struct FarLogfmtRows : LogfmtRows {
  uint64_t behind;
  layout::FarLogfmtRow lies;
};

[[nodiscard]] DEEPEP_DEVICE LogfmtWords words_of(const FarLogfmtRows& given, const LogfmtRow& shape, int number,
                                                 int unit) {
  using namespace dev;
  const bool is_packed = shuffle(given.behind, number) != 0;
  const auto row = reinterpret_cast<std::byte*>(shuffle(given.rows.address, number));
  return is_packed ? packed_words(row, shape, unit) : LogfmtWords::at(row, shape, unit);
}

DEEPEP_DEVICE void load_raw(const FarLogfmtRows& given, const LogfmtRow& shape, int number, int unit,
                            dev::Vec16 (&piece)[kSumUnroll]) {
  using namespace dev;
  const auto behind = reinterpret_cast<std::byte*>(shuffle(given.behind, number));
  const uint64_t words = shuffle(given.metadata, number);
  if (behind == nullptr) {
    const LogfmtRows& near = given;
    return load_raw(near, shape, number, unit, piece);
  }
  const int left = shape.left(unit);
  const uint32_t rest =
      load(reinterpret_cast<const uint32_t*>(reinterpret_cast<std::byte*>(words) + given.lies.rest_of(unit)));
  const RestWords others = RestWords::at(behind, given.lies, rest);
  if (left > 0) piece[0].w[3] = load(others.word(0));
  if (left > kWarpSize) {
    piece[1].w[2] = load(others.word(1));
    piece[1].w[3] = load(others.word(2));
  }
}

/// Row `number` of those that a far rank has put: where its codes, its words, and the put's rests lie.
struct PackedFrom {
  uint64_t row;
  uint64_t metadata;
  uint64_t behind;
};

[[nodiscard]] DEEPEP_DEVICE PackedFrom packed_from(const FarCombineCall& call, int source, int number) {
  const layout::FarLogfmtRow lies{call.args.hidden};
  const auto rows = reinterpret_cast<uint64_t>(
      arrived_at<std::byte>(call.far, call.turn, source, call.far.slots.rows()));
  const uint64_t row = rows + static_cast<uint64_t>(number * lies.bytes());
  return {row + static_cast<uint64_t>(lies.codes()), row,
          rows + static_cast<uint64_t>(rows_from(call, source) * lies.bytes())};
}

/// With the row of each lane that has one from a far rank in its place there.
[[nodiscard]] DEEPEP_DEVICE FarLogfmtRows with_packed(const FarCombineCall& call, const LogfmtRows& near,
                                                      int source, bool is_far, int number) {
  FarLogfmtRows rows{near, 0, {call.args.hidden}};
  if (!is_far) return rows;
  const PackedFrom from = packed_from(call, source, number);
  rows.rows.address = from.row;
  rows.metadata = from.metadata;
  rows.behind = from.behind;
  return rows;
}

[[nodiscard]] DEEPEP_DEVICE FarLogfmtRows sums_of(const FarCombineCall& call, int t, uint32_t ranks) {
  const int source = dev::lane();
  const bool is_far = ((ranks >> source) & 1u) != 0 && !is_mapped(call, source);
  const int number = is_far ? number_of_sent(call, source, t) : 0;
  return with_packed(call, sums_of(call.near(), t, ranks), source, is_far, number);
}

[[nodiscard]] DEEPEP_DEVICE FarLogfmtRows encoded_entries_of(const FarCombineCall& call, int t,
                                                             uint32_t ranks) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const LogfmtRows near = encoded_entries_of(call.near(), t, ranks);
  const int expert = lane() < args.num_topk ? expert_at(args, t * args.num_topk + lane()) : -1;
  const int source = expert < 0 ? 0 : args.share.by_local_experts.quotient(expert);
  const bool has_row = ((near.rows.rows >> lane()) & 1u) != 0;
  const int number = number_of_entry(call, source, has_row, t);
  return with_packed(call, near, source, has_row && !is_mapped(call, source), number);
}

}  // namespace deepep::kernels
