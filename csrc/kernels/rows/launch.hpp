// The host's side of the kernels that a rank runs on its own. Throws std::runtime_error with CUDA's words if a
// launch is refused. `stream` is a cudaStream_t.
#pragma once

#include "kernels/rows/args.hpp"

namespace deepep::kernels {

void launch_sort_pairs(const SortPairsArgs& args, void* stream);
void launch_select_topk(const SelectTopkArgs& args, void* stream);
void launch_count_entries(const CountEntriesArgs& args, void* stream);
void launch_spread_rows(const SpreadRowsArgs& args, void* stream);
void launch_cast_rows(const CastRowsArgs& args, void* stream);
void launch_reduce_rows(const ReduceRowsArgs& args, void* stream);
void launch_weigh_rows(const WeighRowsArgs& args, void* stream);
void launch_swiglu(const SwigluArgs& args, void* stream);
void launch_swiglu_backward(const SwigluArgs& args, void* stream);

}  // namespace deepep::kernels
