// Each received row to the places of its pairs: read once, written for each. A block a row.
//
// Phases:
//   spread_rows
#pragma once

#include "kernels/rows/slots.hpp"

namespace deepep::kernels {

inline constexpr int kSpreadPieces = 4;  // 16-byte pieces of a row that a thread holds

DEEPEP_DEVICE void spread_rows(const SpreadRowsArgs& args) {
  using namespace dev;
  SlotList list;
  const int pieces = static_cast<int>(args.rows.row_bytes / 16);
  for (int64_t row = block(); row < args.rows.num_rows; row += num_blocks()) {
    list_slots(args.rows, nullptr, row, list);
    sync_block();
    const int count = list.count.get(0);
    const Vec16* from = reinterpret_cast<const Vec16*>(args.x + row * args.rows.row_bytes);
    for (int first = thread(); first < pieces; first += kSpreadPieces * num_threads()) {
      Vec16 v[kSpreadPieces];
#pragma unroll
      for (int u = 0; u < kSpreadPieces; ++u)
        if (first + u * num_threads() < pieces) v[u] = load_once(from + first + u * num_threads());
      for (int i = 0; i < count; ++i) {
        Vec16* to = reinterpret_cast<Vec16*>(args.out + list.slot.get(i) * args.rows.row_bytes);
#pragma unroll
        for (int u = 0; u < kSpreadPieces; ++u)
          if (first + u * num_threads() < pieces) store_streaming(to + first + u * num_threads(), v[u]);
      }
    }
    sync_block();  // the list is written again
  }
}

DEEPEP_KERNEL(spread_rows_kernel, SpreadRowsArgs, kRowThreads) { spread_rows(args); }

}  // namespace deepep::kernels
