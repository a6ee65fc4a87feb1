// The gradients of a weighted sum (reduce_rows.hpp): of each pair's row, and of its weight. A block a row.
//
// Phases:
//   weigh_rows  weight * gradient to the pair's place; and the products of gradient and row, summed in fp32: by
//               each thread over its pieces, over a warp in a tree, over warps ascending
#pragma once

#include "kernels/rows/slots.hpp"

namespace deepep::kernels {

/// The sum over the warp, in every lane.
[[nodiscard]] DEEPEP_DEVICE float warp_tree_sum(float value) {
  DEEPEP_ROLLED
  for (int step = dev::kWarpSize / 2; step > 0; step /= 2)
    value = dev::add_rounded(value, dev::shuffle(value, dev::lane() ^ step));
  return value;
}

/// One piece of a pair: returns its gradient, and adds its products to `sum`.
[[nodiscard]] DEEPEP_DEVICE dev::Vec16 weigh_piece(const dev::Vec16& grad, const dev::Vec16& y, float weight,
                                                   float& sum) {
  using namespace dev;
  Vec16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = bf16_low(grad.w[i]), high = bf16_high(grad.w[i]);
    out.w[i] = pack_bf16(mul_rounded(low, weight), mul_rounded(high, weight));
    sum = add_rounded(sum, mul_rounded(low, bf16_low(y.w[i])));
    sum = add_rounded(sum, mul_rounded(high, bf16_high(y.w[i])));
  }
  return out;
}

DEEPEP_DEVICE void weigh_row(const WeighRowsArgs& args, int64_t row, const SlotList& list,
                             dev::SharedArray<float>& sums) {
  using namespace dev;
  const int count = list.count.get(0), pieces = static_cast<int>(args.rows.row_bytes / 16);
  const Vec16* grad = reinterpret_cast<const Vec16*>(args.grad + row * args.rows.row_bytes);
  for (int i = 0; i < count; ++i) {
    const int64_t begin = list.slot.get(i) * args.rows.row_bytes;
    const float weight = list.weight.get(i);
    const Vec16* y = reinterpret_cast<const Vec16*>(args.y + begin);
    Vec16* out = reinterpret_cast<Vec16*>(args.out + begin);
    float sum = 0.0f;
#pragma unroll 4
    for (int piece = thread(); piece < pieces; piece += num_threads())
      store_streaming(out + piece, weigh_piece(load(grad + piece), load_once(y + piece), weight, sum));
    sum = warp_tree_sum(sum);
    if (lane() == 0) sums.set(i * num_warps() + warp(), sum);
  }
}

/// The weights' gradients, by the first warp; lane k has entry k.
DEEPEP_DEVICE void write_dots(const WeighRowsArgs& args, int64_t row, const dev::SharedArray<float>& sums) {
  using namespace dev;
  if (warp() != 0) return;
  const int64_t at = row * args.rows.num_topk + lane();
  const bool has = lane() < args.rows.num_topk;
  const bool is_present = has && load_once(args.rows.slots + at) >= 0;
  const int place = popcount(ballot(is_present) & ((1u << lane()) - 1u));
  float sum = 0.0f;
  for (int w = 0; is_present && w < num_warps(); ++w) sum = add_rounded(sum, sums.get(place * num_warps() + w));
  if (has) store(args.out_weights + at, sum);
}

DEEPEP_DEVICE void weigh_rows(const WeighRowsArgs& args) {
  using namespace dev;
  SlotList list;
  SharedArray<float> sums(SlotList::kEndAt);  // [K, warps]
  for (int64_t row = block(); row < args.rows.num_rows; row += num_blocks()) {
    list_slots(args.rows, args.weights, row, list);
    sync_block();
    weigh_row(args, row, list, sums);
    sync_block();  // all sums are there; the list is written again, the sums behind the next barrier
    write_dots(args, row, sums);
  }
}

DEEPEP_KERNEL(weigh_rows_kernel, WeighRowsArgs, kRowThreads) { weigh_rows(args); }

}  // namespace deepep::kernels
