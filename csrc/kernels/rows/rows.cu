#include "kernels/common/launch.cuh"
#include "kernels/rows/cast_rows.hpp"
#include "kernels/rows/count_entries.hpp"
#include "kernels/rows/launch.hpp"
#include "kernels/rows/reduce_rows.hpp"
#include "kernels/rows/select_topk.hpp"
#include "kernels/rows/sort_pairs.hpp"
#include "kernels/rows/spread_rows.hpp"
#include "kernels/rows/swiglu.hpp"
#include "kernels/rows/swiglu_backward.hpp"
#include "kernels/rows/weigh_rows.hpp"

namespace deepep::kernels {

namespace {

/// Blocks for so many rows: each has its own, up to what a grid may hold without a thought.
int blocks_for(int64_t rows) { return static_cast<int>(rows < (1 << 20) ? rows : (1 << 20)); }

constexpr int64_t kListBytes = SlotList::kEndAt;
constexpr int64_t kSumBytes = 4 * kMaxRowEntries * (kRowThreads / 32);

}  // namespace

void launch_sort_pairs(const SortPairsArgs& args, void* stream) {
  const int64_t bytes = 8 * (kSortThreads / 32);
  launch<SortPairsArgs>(sort_pairs_kernel, args, args.num_local_experts, kSortThreads, bytes, stream,
                        "sort pairs");
}

void launch_select_topk(const SelectTopkArgs& args, void* stream) {
  constexpr int64_t kWarps = kRowThreads / 32;
  launch<SelectTopkArgs>(select_topk_kernel, args, blocks_for((args.num_tokens + kWarps - 1) / kWarps),
                         kRowThreads, 0, stream, "select top-k");
}

void launch_count_entries(const CountEntriesArgs& args, void* stream) {
  const int64_t blocks = (args.num_entries + 8 * kCountThreads - 1) / (8 * kCountThreads);
  launch<CountEntriesArgs>(count_entries_kernel, args, static_cast<int>(blocks < 32 ? blocks : 32),
                           kCountThreads, 4 * args.num_experts, stream, "count entries");
}

void launch_spread_rows(const SpreadRowsArgs& args, void* stream) {
  launch<SpreadRowsArgs>(spread_rows_kernel, args, blocks_for(args.rows.num_rows), kRowThreads, kListBytes,
                         stream, "spread rows");
}

void launch_cast_rows(const CastRowsArgs& args, void* stream) {
  constexpr int64_t kOfBlock = kCastChannels * kRowThreads;
  launch<CastRowsArgs>(cast_rows_kernel, args, blocks_for((args.num_channels + kOfBlock - 1) / kOfBlock),
                       kRowThreads, 0, stream, "cast rows");
}

void launch_reduce_rows(const ReduceRowsArgs& args, void* stream) {
  launch<ReduceRowsArgs>(reduce_rows_kernel, args, blocks_for(args.rows.num_rows), kRowThreads, kListBytes,
                         stream, "reduce rows");
}

void launch_weigh_rows(const WeighRowsArgs& args, void* stream) {
  launch<WeighRowsArgs>(weigh_rows_kernel, args, blocks_for(args.rows.num_rows), kRowThreads,
                        kListBytes + kSumBytes, stream, "weigh rows");
}

void launch_swiglu(const SwigluArgs& args, void* stream) {
  launch<SwigluArgs>(swiglu_kernel, args, blocks_for(args.num_rows), kRowThreads, 0, stream, "swiglu");
}

void launch_swiglu_backward(const SwigluArgs& args, void* stream) {
  launch<SwigluArgs>(swiglu_backward_kernel, args, blocks_for(args.num_rows), kRowThreads, 0, stream,
                     "swiglu backward");
}

}  // namespace deepep::kernels
