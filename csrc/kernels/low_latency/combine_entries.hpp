// Rows of experts back to the owners of their tokens, each as it is: the phase of a combine that sends where
// every top-k entry has a row that goes back.
#pragma once

#include "kernels/low_latency/combine_reduce.hpp"

namespace deepep::kernels {

inline constexpr int kEntryUnroll = 2;  // 16-byte accesses of a row that a lane has in flight,
inline constexpr int kEntryRows = 4;    // rows

/// A message's rows. Lane k: where the k-th entry's comes from and goes to.
struct CopyRows {
  uint32_t rows;  // as bits
  uint64_t from;
  uint64_t to;
};

/// The 16-byte pieces [first, end) of the rows. One warp.
DEEPEP_DEVICE void copy_rows(const CopyRows& given, int first, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = first + lane(); begin < end + lane(); begin += kEntryUnroll * kWarpSize) {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
#pragma unroll 1
    for (uint32_t rows = given.rows; rows != 0;) {
      Vec16 v[kEntryRows][kEntryUnroll] = {};
      Vec16* to[kEntryRows] = {};
#pragma unroll
      for (int i = 0; i < kEntryRows; ++i) {
        if (rows == 0) continue;
        const int row = lowest_bit(rows);
        rows &= rows - 1;
        const Vec16* from = reinterpret_cast<const Vec16*>(shuffle(given.from, row)) + begin;
        to[i] = reinterpret_cast<Vec16*>(shuffle(given.to, row)) + begin;
#pragma unroll
        for (int u = 0; u < kEntryUnroll; ++u)
          if (u * kWarpSize < left) v[i][u] = load_once(from + u * kWarpSize);
      }
#pragma unroll
      for (int i = 0; i < kEntryRows; ++i) {
        if (to[i] == nullptr) continue;
#pragma unroll
        for (int u = 0; u < kEntryUnroll; ++u)
          if (u * kWarpSize < left) store_streaming(to[i] + u * kWarpSize, v[i][u]);
      }
    }
  }
}

/// The row of each entry of a token, in the memory of its owner, where `source` writes it. Lane k: the k-th's.
[[nodiscard]] DEEPEP_DEVICE uint64_t entry_at(const LowLatencyCombineCall& call, int owner, int source,
                                              int token) {
  const LowLatencyCombineArgs& args = call.args;
  const int64_t number = int64_t{token} * args.num_topk + dev::lane();
  return reinterpret_cast<uint64_t>(
      at<std::byte>(call.g, owner, args.slots.entries(call.epoch, source) + number * 2 * args.hidden));
}

/// Where the rows of a message go. Lane k: the k-th entry's, of those that have one.
[[nodiscard]] DEEPEP_DEVICE uint64_t entry_to(const LowLatencyCombineCall& call, const MessageAt& where,
                                              uint32_t) {
  return entry_at(call, where.source, call.g.rank, where.token);
}

/// The block's messages: all of their rows.
template <class Call>
DEEPEP_DEVICE void return_entries(const Call& call) {
  const int shift = call.args.share.message_shift;
  const Team team = team_of_warp(shift);
  const Pieces mine = pieces_of(call, team.part, shift);
  auto walk = walk_of(call, present_of(call), team);
#pragma unroll 1
  for (MessageAt where = walk.next(); where.token >= 0; where = walk.next()) {
    const Return back = find_return(call, where, load_route(call.args, where));
    copy_rows({back.rows, back.address, entry_to(call, where, back.rows)}, mine.begin, mine.end);
  }
}

}  // namespace deepep::kernels
