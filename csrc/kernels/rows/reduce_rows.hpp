// The weighted sum of each received row's pairs. A block a row.
//
// Phases:
//   reduce_rows  weight, rounded to bf16, times row, rounded to bf16; summed in fp32, k ascending; rounded once
#pragma once

#include "kernels/common/entry_sum.hpp"
#include "kernels/rows/slots.hpp"

namespace deepep::kernels {

inline constexpr int kReduceUnroll = 4;  // pairs whose pieces a thread has in flight

template <bool kWeighted>
DEEPEP_DEVICE void reduce_row(const ReduceRowsArgs& args, int64_t row, const SlotList& list) {
  using namespace dev;
  const int count = list.count.get(0), pieces = static_cast<int>(args.rows.row_bytes / 16);
  for (int piece = thread(); piece < pieces; piece += num_threads()) {
    float sum[8] = {};
    for (int first = 0; first < count; first += kReduceUnroll) {
      Vec16 v[kReduceUnroll];
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u)
        if (first + u < count)
          v[u] = load_once(
              reinterpret_cast<const Vec16*>(args.y + list.slot.get(first + u) * args.rows.row_bytes) + piece);
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u)
        if (first + u < count) add_piece<kWeighted>(sum, v[u], kWeighted ? list.weight.get(first + u) : 1.0f);
    }
    store(reinterpret_cast<Vec16*>(args.out + row * args.rows.row_bytes) + piece, round_sums(sum));
  }
}

DEEPEP_DEVICE void reduce_rows(const ReduceRowsArgs& args) {
  using namespace dev;
  SlotList list;
  for (int64_t row = block(); row < args.rows.num_rows; row += num_blocks()) {
    list_slots(args.rows, args.weights, row, list);
    sync_block();
    if (args.weights != nullptr)
      reduce_row<true>(args, row, list);
    else
      reduce_row<false>(args, row, list);
    sync_block();  // the list is written again
  }
}

DEEPEP_KERNEL(reduce_rows_kernel, ReduceRowsArgs, kRowThreads) { reduce_rows(args); }

}  // namespace deepep::kernels
