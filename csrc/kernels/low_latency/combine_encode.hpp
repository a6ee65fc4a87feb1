// Rows back to the owners of their tokens in LogFMT: the phases of a combine that send, where `combine_reduce`
// and `combine_entries` have others.
#pragma once

#include "kernels/low_latency/combine_entries.hpp"
#include "kernels/low_latency/logfmt_rows.hpp"

namespace deepep::kernels {

/// This warp's part of what a team has of a row, in chunks or units.
[[nodiscard]] DEEPEP_DEVICE Pieces share_of_team(int number, const Team& team, int shift) {
  return {(number * team.part) >> shift, (number * (team.part + 1)) >> shift};
}

/// Row number `number` of those that `source` returns, in its owner's memory: from the begin of its stretch on.
[[nodiscard]] DEEPEP_DEVICE LogfmtPlace place_of(const LowLatencyCombineCall& call, int owner, int source,
                                                 int64_t number) {
  const LowLatencyCombineArgs& args = call.args;
  const int64_t row_bytes = int64_t{2} * args.hidden;
  const int64_t rows =
      returns_entries(args) ? args.slots.entries(call.epoch, source) : args.slots.returns(call.epoch, source);
  return {at<std::byte>(call.g, owner, rows + number * row_bytes),
          at<uint32_t>(call.g, owner,
                       args.slots.metadata(call.epoch, source) + number * args.slots.metadata_of(row_bytes))};
}

/// Where the row goes that is made of a message, and where that of its k-th entry; `rows`: its entries that
/// have one.
[[nodiscard]] DEEPEP_DEVICE LogfmtPlace encoded_to(const LowLatencyCombineCall& call, const MessageAt& where) {
  return place_of(call, where.source, call.g.rank, where.token);
}
[[nodiscard]] DEEPEP_DEVICE LogfmtPlace encoded_to(const LowLatencyCombineCall& call, const MessageAt& where,
                                                   uint32_t, int k) {
  return place_of(call, where.source, call.g.rank, int64_t{where.token} * call.args.num_topk + k);
}

/// A part of a message's rows to one, encoded. One warp. False if a weight does not come, and no other is to be
/// waited for.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool encode_sum(const Call& call, const Return& back,
                                            const LogfmtRow& shape, const Pieces& chunks) {
  const SumRows rows = weighted_rows(call, back);
  if (rows.rows == 0) {
    note_missing_weight(call, back.where.source);
    return call.masks;
  }
  const auto to = encoded_to(call, back.where);
#pragma unroll 1
  for (int c = chunks.begin; c < chunks.end; ++c) {
    LogfmtChunk chunk = {};
#pragma unroll
    for (int h = 0; h < kChunkUnits; ++h) {
      if (h >= shape.chunk_units) continue;
      const int unit = c * shape.chunk_units + h;
      const LaneSums sum = sum_pieces<true>(rows, unit * kUnitPieces + dev::lane(), shape.left(unit));
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) chunk.piece[h][u] = round_channels(sum.of[u]);
    }
    store_chunk(to, shape, c * shape.chunk_units, chunk);
  }
  return true;
}

/// The block's messages, each one's rows to one.
template <class Call>
DEEPEP_DEVICE void encode_sums(const Call& call, Returning returning) {
  const int shift = call.args.share.message_shift;
  const Team team = team_of_warp(shift);
  const LogfmtRow shape = LogfmtRow::of(call.args.hidden);
  const Pieces chunks = share_of_team(shape.chunks(), team, shift);
#pragma unroll 1
  while (returning.back.rows != 0) {
    const Return back = returning.back;
    returning.back = next_return(call, returning);
    if (!encode_sum(call, back, shape, chunks)) return;
  }
}

/// A part of one row of this rank's experts, encoded. One warp.
template <class Place>
DEEPEP_DEVICE void encode_row(uint64_t from, const Place& to, const LogfmtRow& shape,
                              const Pieces& chunks) {
  using namespace dev;
#pragma unroll 1
  for (int c = chunks.begin; c < chunks.end; ++c) {
    LogfmtChunk chunk = {};
#pragma unroll
    for (int h = 0; h < kChunkUnits; ++h) {
      if (h >= shape.chunk_units) continue;
      const int unit = c * shape.chunk_units + h, left = shape.left(unit);
      const Vec16* pieces = reinterpret_cast<const Vec16*>(from) + unit * kUnitPieces + lane();
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u)
        if (u * kWarpSize < left) chunk.piece[h][u] = load_once(pieces + u * kWarpSize);
    }
    store_chunk(to, shape, c * shape.chunk_units, chunk);
  }
}

/// The block's messages, this rank's own among them: all of their rows.
template <class Call>
DEEPEP_DEVICE void encode_entries(const Call& call) {
  using namespace dev;
  const int shift = call.args.share.message_shift;
  const Team team = team_of_warp(shift);
  const LogfmtRow shape = LogfmtRow::of(call.args.hidden);
  const Pieces chunks = share_of_team(shape.chunks(), team, shift);
  auto walk = walk_of(call, present_of(call), team);
#pragma unroll 1
  for (MessageAt where = walk.next(); where.token >= 0; where = walk.next()) {
    const Return back = find_return(call, where, load_route(call.args, where));
#pragma unroll 1
    for (uint32_t rows = back.rows; rows != 0; rows &= rows - 1) {
      const int k = lowest_bit(rows);
      encode_row(shuffle(back.address, k), encoded_to(call, where, back.rows, k), shape, chunks);
    }
  }
}

}  // namespace deepep::kernels
