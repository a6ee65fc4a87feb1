// A row of this rank as a combine reads it: as it was received, or as the sum of expanded ones.
#pragma once

#include "kernels/common/args.hpp"
#include "kernels/common/entry_sum.hpp"

namespace deepep::kernels {

inline constexpr int kReturnUnroll = 14;  // 16-byte accesses a lane has in flight when it pushes
inline constexpr int kSummedUnroll = 3;    // the same of each of kSummedRows rows where it sums them first
inline constexpr int kSummedRows = 4;
inline constexpr int kAhead = 2;  // turns of these by which their rows come to the cache before

/// It lies in x, and its weights behind those of the rows before.
struct ReceivedRow {
  static constexpr bool kExpanded = false;
  static constexpr int kUnroll = kReturnUnroll;
  const dev::Vec16* from;
  const float* weights;

  [[nodiscard]] DEEPEP_DEVICE static ReceivedRow of(const CombineArgs& args, int64_t row) {
    return {reinterpret_cast<const dev::Vec16*>(args.x + row * args.row_bytes),
            args.topk_weights + row * args.num_topk};
  }
  DEEPEP_DEVICE void prefetch(int, int) const {}
  /// Its pieces from `begin` on, those u with u * kWarpSize < left.
  DEEPEP_DEVICE void read(int begin, int left, dev::Vec16 (&v)[kUnroll]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (u * dev::kWarpSize < left) v[u] = dev::load_once(from + begin + u * dev::kWarpSize);
  }
  /// Of entry `lane`, which there is.
  [[nodiscard]] DEEPEP_DEVICE float weight() const { return dev::load_once(weights + dev::lane()); }
};

/// It is summed of those rows of x that its top-k entries have; 0 if none has. Lane k holds what concerns
/// entry k. Whole warps.
struct ExpandedRow {
  static constexpr bool kExpanded = true;
  static constexpr int kUnroll = kSummedUnroll;
  const CombineArgs& args;
  int64_t slot;      // of x, or -1
  float factor;      // of that row, as bf16 has it
  uint32_t present;  // the entries that have one, as bits

  /// row: -1 for one that has no entries.
  [[nodiscard]] DEEPEP_DEVICE static ExpandedRow of(const CombineArgs& args, int64_t row) {
    using namespace dev;
    const bool has = row >= 0 && lane() < args.num_entries;
    const int64_t at = row * args.num_entries + lane();
    const int64_t slot = has ? load_once(args.slots + at) : -1;
    float factor = 1.0f;
    if (has && args.factors != nullptr) factor = round_to_bf16(load_once(args.factors + at));
    return {args, slot, factor, ballot(slot >= 0)};
  }
  /// Has the pieces [begin, end) of all of them on their way to the cache, as far as there are any.
  DEEPEP_DEVICE void prefetch(int begin, int end) const {
    if (slot >= 0 && begin < end)
      dev::prefetch(args.x + slot * args.row_bytes + int64_t{16} * begin, int64_t{16} * (end - begin));
  }
  /// Its pieces from `begin` on, those u with u * kWarpSize < left: 0.0 + the entries' rows in fp32, k
  /// ascending, rounded once.
  DEEPEP_DEVICE void read(int begin, int left, dev::Vec16 (&v)[kUnroll]) const {
    if (args.factors != nullptr)
      sum<true>(begin, left, v);
    else
      sum<false>(begin, left, v);
  }
  /// Of entry `lane`, which there is.
  [[nodiscard]] DEEPEP_DEVICE float weight() const {
    return slot >= 0 ? dev::load_once(args.topk_weights + slot) : 0.0f;
  }

 private:
  template <bool kWeighted>
  DEEPEP_DEVICE void sum(int begin, int left, dev::Vec16 (&v)[kUnroll]) const {
    using namespace dev;
    constexpr int kTurn = kUnroll * kWarpSize;
    const int ahead = begin - lane() + kAhead * kTurn;
    prefetch(ahead, layout::min_of(ahead + kTurn, begin + left));
    float sums[kUnroll][8] = {};
    Vec16 pieces[kSummedRows][kUnroll] = {};
#pragma unroll 1
    for (uint32_t rest = present; rest != 0;) {
      uint32_t coming = rest;
#pragma unroll
      for (int r = 0; r < kSummedRows; ++r, coming &= coming - 1) {
        if (coming == 0) continue;
        const Vec16* from = reinterpret_cast<const Vec16*>(
            args.x + shuffle(slot, lowest_bit(coming)) * args.row_bytes);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (u * kWarpSize < left) pieces[r][u] = load_once(from + begin + u * kWarpSize);
      }
#pragma unroll
      for (int r = 0; r < kSummedRows; ++r, rest &= rest - 1) {
        if (rest == 0) continue;
        const float by = kWeighted ? shuffle(factor, lowest_bit(rest)) : 1.0f;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add_piece<kWeighted>(sums[u], pieces[r][u], by);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = round_sums(sums[u]);
  }
};

/// Of the pieces [from, end) of a row, those that are read first.
template <class Row>
DEEPEP_DEVICE void prefetch_start(const Row& row, int from, int end) {
  row.prefetch(from, layout::min_of(from + kAhead * Row::kUnroll * dev::kWarpSize, end));
}

}  // namespace deepep::kernels
