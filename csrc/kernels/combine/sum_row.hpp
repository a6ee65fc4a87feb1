// The sum of one token's rows, or of a part of them, by one warp; reduce.hpp chooses the rows.
//
// In fp32, in one order (biases, then rows by rank), with one rounding: the same bits from any warp.
#pragma once

#include "kernels/combine/row.hpp"
#include "kernels/common/group.hpp"

namespace deepep::kernels {

inline constexpr int kPairUnroll = 10;  // 16-byte accesses of each of two addends that a lane has in flight
inline constexpr int kManyUnroll = 4;   // the same where sums of more are kept

/// The addends of a token in the order of their addition: biases, then rows by rank. Lane i holds the i-th
/// one's address. A peer's row was written while this kernel ran: all are read plainly, behind the flags.
struct Addends {
  uint64_t address;
  int count;
  uint32_t remote;  // those that peers send, as bits
};

/// Reads this lane's pieces, those u with u * kWarpSize < left. `v` is set before: ptxas takes what a
/// predicated load writes for alive since the kernel's start otherwise, and spills.
template <int kPieces>
DEEPEP_DEVICE void read_pieces(const dev::Vec16* source, int left, dev::Vec16 (&v)[kPieces]) {
  using namespace dev;
#pragma unroll
  for (int u = 0; u < kPieces; ++u)
    if (u * kWarpSize < left) v[u] = load_streaming(source + u * kWarpSize);
}

template <int kPieces>
DEEPEP_DEVICE void read_addend(const Addends& addends, int i, int begin, int left, dev::Vec16 (&v)[kPieces]) {
  read_pieces(reinterpret_cast<const dev::Vec16*>(dev::shuffle(addends.address, i)) + begin, left, v);
}

/// Eight sums in fp32. The first addend starts them, so that -0.0 alone stays -0.0; the others are added.
template <bool kFirst>
DEEPEP_DEVICE void accumulate(float (&sum)[8], const dev::Vec16& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = dev::bf16_low(v.w[i]);
    const float high = dev::bf16_high(v.w[i]);
    sum[2 * i] = kFirst ? low : dev::add_rounded(sum[2 * i], low);
    sum[2 * i + 1] = kFirst ? high : dev::add_rounded(sum[2 * i + 1], high);
  }
}

/// One part of one token, for one or two addends of which at most one is a peer's: all that is in flight is
/// rows, so more of them. Two sum to the same bits in either order, and in bf16 to the same as in fp32: that
/// has more than twice the digits and two to spare, so to round to it first changes nothing.
struct Pair {
  const dev::Vec16* here;  // a bias or the rank's own row, or null
  const dev::Vec16* last;  // the peer's row, or another that is here, or null
};

[[nodiscard]] DEEPEP_DEVICE bool is_pair_of(const Addends& addends) {
  return addends.count == 1 || (addends.count == 2 && dev::popcount(addends.remote) <= 1);
}

[[nodiscard]] DEEPEP_DEVICE Pair pair_of(const Addends& addends) {
  const uint32_t all = (1u << addends.count) - 1u;
  const uint32_t here = all & ~addends.remote;
  const int first = here != 0 ? dev::lowest_bit(here) : -1;
  const uint32_t others = first >= 0 ? all & ~(1u << first) : all;
  const uint64_t a = dev::shuffle(addends.address, first >= 0 ? first : 0);
  const uint64_t b = dev::shuffle(addends.address, others != 0 ? dev::lowest_bit(others) : 0);
  return {reinterpret_cast<const dev::Vec16*>(first >= 0 ? a : 0),
          reinterpret_cast<const dev::Vec16*>(others != 0 ? b : 0)};
}

/// A bf16 pair that changes no sum.
inline constexpr uint32_t kNegativeZeros = 0x80008000u;

template <int kPieces>
DEEPEP_DEVICE void set_to_negative_zero(dev::Vec16 (&v)[kPieces]) {
#pragma unroll
  for (int u = 0; u < kPieces; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) v[u].w[i] = kNegativeZeros;
}

/// Its sum, by one warp. The part's 16-byte pieces are [from, end) of the row; `here`: the first of pair.here,
/// or -0.
DEEPEP_DEVICE void reduce_pair(dev::Vec16* out, const Pair& pair, int from, int end,
                               dev::Vec16 (&here)[kPairUnroll]) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane();;) {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 last[kPairUnroll];
    set_to_negative_zero(last);
    if (pair.last != nullptr) read_pieces(pair.last + begin, left, last);
#pragma unroll
    for (int u = 0; u < kPairUnroll; ++u) {
      if (u * kWarpSize >= left) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) last[u].w[i] = add_bf16(here[u].w[i], last[u].w[i]);
      store_streaming(out + begin + u * kWarpSize, last[u]);
    }
    begin += kPairUnroll * kWarpSize;
    if (begin >= end + lane()) break;
    if (pair.here != nullptr) read_pieces(pair.here + begin, end - begin, here);
  }
}

/// The sum of any number of addends, none included. Two are on their way at a time.
DEEPEP_DEVICE void reduce_many(dev::Vec16* out, const Addends& addends, int from, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane(); begin < end + lane(); begin += kManyUnroll * kWarpSize) {
    const int left = end - begin;
    float sum[kManyUnroll][8] = {};
    Vec16 even[kManyUnroll] = {}, odd[kManyUnroll] = {};
#pragma unroll 1
    for (int i = 0; i < addends.count; i += 2) {
      const bool two = i + 1 < addends.count;
      read_addend(addends, i, begin, left, even);
      if (two) read_addend(addends, i + 1, begin, left, odd);
#pragma unroll
      for (int u = 0; u < kManyUnroll; ++u) {
        if (u * kWarpSize >= left) continue;
        if (i == 0)
          accumulate<true>(sum[u], even[u]);
        else
          accumulate<false>(sum[u], even[u]);
        if (two) accumulate<false>(sum[u], odd[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kManyUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(out + begin + u * kWarpSize, round_sums(sum[u]));
  }
}

/// The same where one of the addends, the `own`-th, is made here of the rank's expanded rows; -1: none is.
DEEPEP_DEVICE void reduce_expanded(dev::Vec16* out, const Addends& addends, int own, const ExpandedRow& row,
                                   int from, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane(); begin < end + lane(); begin += kSummedUnroll * kWarpSize) {
    const int left = end - begin;
    float sum[kSummedUnroll][8] = {};
    Vec16 made[kSummedUnroll] = {}, read[kSummedUnroll] = {};
    if (own >= 0) row.read(begin, left, made);
#pragma unroll 1
    for (int i = 0; i < addends.count; ++i) {
      if (i != own) read_addend(addends, i, begin, left, read);
#pragma unroll
      for (int u = 0; u < kSummedUnroll; ++u) {
        const Vec16 addend = i == own ? made[u] : read[u];
        if (i == 0)
          accumulate<true>(sum[u], addend);
        else
          accumulate<false>(sum[u], addend);
      }
    }
#pragma unroll
    for (int u = 0; u < kSummedUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(out + begin + u * kWarpSize, round_sums(sum[u]));
  }
}

/// One token's rows; lane r handles rank r.
struct TokenRows {
  int32_t at_rank;  // its number in rank r's output, or -1
  int32_t place;    // of rank r's row in the staging here, if that is a peer
  uint32_t ranks;   // the ranks that have one, as bits
  uint32_t remote;  // those of them that are peers

  [[nodiscard]] DEEPEP_DEVICE bool is_remote() const { return (remote >> dev::lane()) & 1u; }
};

/// The address of rank r's row here.
[[nodiscard]] DEEPEP_DEVICE uint64_t address_of_row(const CombineArgs& args, const TokenRows& rows) {
  const std::byte* area = args.group.heap[args.group.rank] + args.group.staging_offset;
  return reinterpret_cast<uint64_t>(rows.is_remote() ? area + args.staging.row(rows.place)
                                                     : args.x + rows.at_rank * args.row_bytes);
}

/// The token's rows as a list: lane i gets the i-th rank's, in rank order, behind the biases.
[[nodiscard]] DEEPEP_DEVICE Addends list_addends(const CombineArgs& args, int64_t t, const TokenRows& rows) {
  using namespace dev;
  Addends addends{0, 0, 0};
  for (int b = 0; b < 2; ++b) {
    if (args.bias[b] == nullptr) continue;
    if (lane() == addends.count)
      addends.address = reinterpret_cast<uint64_t>(args.bias[b] + t * args.row_bytes);
    ++addends.count;
  }
  const uint64_t row = address_of_row(args, rows);
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int r = lowest_bit(left);
    const uint64_t address = shuffle(row, r);
    if (lane() == addends.count) addends.address = address;
    addends.remote |= ((rows.remote >> r) & 1u) << addends.count;
    ++addends.count;
  }
  return addends;
}

/// The place of the rank's own row among the addends; -1: it has none.
[[nodiscard]] DEEPEP_DEVICE int place_of_own(const CombineArgs& args, const TokenRows& rows) {
  const uint32_t own = 1u << args.group.rank;
  if ((rows.ranks & own) == 0) return -1;
  const int biases = (args.bias[0] != nullptr ? 1 : 0) + (args.bias[1] != nullptr ? 1 : 0);
  return biases + dev::popcount(rows.ranks & (own - 1u));
}

/// Weights of token t, each entry the sum over ranks, ascending. Lane k holds entry k; `own`: the rank's row.
template <class Row>
DEEPEP_DEVICE void reduce_weights(const CombineArgs& args, int64_t t, const TokenRows& rows, const Row& own) {
  using namespace dev;
  const std::byte* area = args.group.heap[args.group.rank] + args.group.staging_offset;
  const uint64_t weights = reinterpret_cast<uint64_t>(area + args.staging.weights(rows.place));
  float weight = 0.0f;
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int r = lowest_bit(left);
    const float* addend = reinterpret_cast<const float*>(shuffle(weights, r));
    if (lane() < args.num_topk)
      weight = add_rounded(weight, r == args.group.rank ? own.weight() : load(addend + lane()));
  }
  if (lane() < args.num_topk) store(args.out_weights + t * args.num_topk + lane(), weight);
}

}  // namespace deepep::kernels
