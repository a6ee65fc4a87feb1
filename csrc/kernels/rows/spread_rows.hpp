// Each received row to the places of its pairs: read once, written for each. A block a row.
//
// Phases:
//   spread_rows  as it is; or, of a row that came in FP8, value * scale, rounded to bf16
#pragma once

#include "kernels/rows/slots.hpp"

namespace deepep::kernels {

inline constexpr int kSpreadPieces = 4;  // 16-byte pieces of a row that a thread holds

/// Eight channels: bytes, the first in the lowest, times their scale.
[[nodiscard]] DEEPEP_DEVICE dev::Vec16 uncast_piece(uint64_t bytes, float scale) {
  using namespace dev;
  Vec16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = static_cast<uint32_t>(bytes >> (16 * i));
    out.w[i] = pack_bf16(mul_rounded(float_of_bits(bits_of_e4m3(pair)), scale),
                         mul_rounded(float_of_bits(bits_of_e4m3(pair >> 8)), scale));
  }
  return out;
}

/// Piece `piece` of row `row`, as it is spread.
template <bool kScaled>
[[nodiscard]] DEEPEP_DEVICE dev::Vec16 load_piece(const SpreadRowsArgs& args, int64_t row, int piece) {
  using namespace dev;
  const int64_t at = row * (args.rows.row_bytes / 16) + piece;
  if constexpr (!kScaled) {
    return load_once(reinterpret_cast<const Vec16*>(args.x) + at);
  } else {
    return uncast_piece(load_once(reinterpret_cast<const uint64_t*>(args.x) + at),
                        load_once(args.scales + at / (kScaleGroup / 8)));
  }
}

template <bool kScaled>
DEEPEP_DEVICE void spread_row(const SpreadRowsArgs& args, int64_t row, const SlotList& list) {
  using namespace dev;
  const int count = list.count.get(0), pieces = static_cast<int>(args.rows.row_bytes / 16);
  for (int first = thread(); first < pieces; first += kSpreadPieces * num_threads()) {
    Vec16 v[kSpreadPieces];
#pragma unroll
    for (int u = 0; u < kSpreadPieces; ++u)
      if (first + u * num_threads() < pieces) v[u] = load_piece<kScaled>(args, row, first + u * num_threads());
    for (int i = 0; i < count; ++i) {
      Vec16* to = reinterpret_cast<Vec16*>(args.out + list.slot.get(i) * args.rows.row_bytes);
#pragma unroll
      for (int u = 0; u < kSpreadPieces; ++u)
        if (first + u * num_threads() < pieces) store_streaming(to + first + u * num_threads(), v[u]);
    }
  }
}

DEEPEP_DEVICE void spread_rows(const SpreadRowsArgs& args) {
  using namespace dev;
  SlotList list;
  for (int64_t row = block(); row < args.rows.num_rows; row += num_blocks()) {
    list_slots(args.rows, nullptr, row, list);
    sync_block();
    if (args.scales != nullptr)
      spread_row<true>(args, row, list);
    else
      spread_row<false>(args, row, list);
    sync_block();  // the list is written again
  }
}

DEEPEP_KERNEL(spread_rows_kernel, SpreadRowsArgs, kRowThreads) { spread_rows(args); }

}  // namespace deepep::kernels
