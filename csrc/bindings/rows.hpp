// The kernels around the local experts from Python: the same arguments for deepep._cuda and deepep._emulator.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/domain.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::bindings {

[[nodiscard]] inline kernels::RowSpan row_span(int64_t num_rows, int64_t row_bytes, int num_topk,
                                               uintptr_t slots) {
  if (row_bytes < 16 || row_bytes % 16 != 0) throw std::invalid_argument("row_bytes: a multiple of 16");
  if (num_topk < 1 || num_topk > kernels::kMaxRowEntries) throw std::invalid_argument("num_topk: 1 to 32");
  return {num_rows, row_bytes, num_topk, pointer<const int64_t>(slots)};
}

[[nodiscard]] inline kernels::SwigluArgs swiglu_args(int64_t num_rows, int64_t width, uintptr_t h,
                                                     uintptr_t grad, uintptr_t out) {
  if (width < 8 || width % 8 != 0) throw std::invalid_argument("width: a multiple of 8");
  return {.num_rows = num_rows,
          .width = width,
          .h = pointer<const std::byte>(h),
          .grad = pointer<const std::byte>(grad),
          .out = pointer<std::byte>(out)};
}

inline void check_index_bytes(int index_bytes) {
  if (index_bytes != 4 && index_bytes != 8) throw std::invalid_argument("index_bytes: 4 or 8");
}

/// Those that look at top-k entries. `Use`: a struct whose functions take arguments and a stream. _cuda
/// launches; _emulator, whose functions have names that end in `suffix`, returns the arguments' bytes.
template <class Use>
void bind_entries(py::module_& m, const std::string& suffix) {
  m.def(
      ("sort_pairs" + suffix).c_str(),
      [](uintptr_t topk_idx, int index_bytes, int num_local_experts, int64_t num_entries, int64_t num_pairs,
         uintptr_t pairs, uintptr_t slots, uintptr_t ends, uintptr_t stream) {
        check_index_bytes(index_bytes);
        const kernels::SortPairsArgs args{.topk_idx = pointer<const void>(topk_idx),
                                          .index_bytes = index_bytes,
                                          .num_local_experts = num_local_experts,
                                          .num_entries = num_entries,
                                          .num_pairs = num_pairs,
                                          .pairs = pointer<int64_t>(pairs),
                                          .slots = pointer<int64_t>(slots),
                                          .ends = pointer<int32_t>(ends)};
        return Use::sort_pairs(args, pointer<void>(stream));
      },
      py::kw_only(), "topk_idx"_a, "index_bytes"_a, "num_local_experts"_a, "num_entries"_a, "num_pairs"_a,
      "pairs"_a, "slots"_a, "ends"_a, "stream"_a = 0);
  m.def(
      ("select_topk" + suffix).c_str(),
      [](int64_t num_tokens, int num_experts, int num_topk, uintptr_t scores, uintptr_t topk_idx,
         uintptr_t stream) {
        if (num_topk < 1 || num_topk > num_experts) throw std::invalid_argument("num_topk: 1 to num_experts");
        const kernels::SelectTopkArgs args{.num_tokens = num_tokens,
                                           .num_experts = num_experts,
                                           .num_topk = num_topk,
                                           .scores = pointer<const float>(scores),
                                           .topk_idx = pointer<int64_t>(topk_idx)};
        return Use::select_topk(args, pointer<void>(stream));
      },
      py::kw_only(), "num_tokens"_a, "num_experts"_a, "num_topk"_a, "scores"_a, "topk_idx"_a, "stream"_a = 0);
  m.def(
      ("count_entries" + suffix).c_str(),
      [](uintptr_t topk_idx, int index_bytes, int num_experts, int64_t num_entries, uintptr_t load,
         uintptr_t stream) {
        check_index_bytes(index_bytes);
        if (num_experts < 1 || num_experts > kernels::kMaxCountedExperts)
          throw std::invalid_argument("num_experts: 1 to 8192");
        const kernels::CountEntriesArgs args{.topk_idx = pointer<const void>(topk_idx),
                                             .index_bytes = index_bytes,
                                             .num_experts = num_experts,
                                             .num_entries = num_entries,
                                             .load = pointer<uint64_t>(load)};
        return Use::count_entries(args, pointer<void>(stream));
      },
      py::kw_only(), "topk_idx"_a, "index_bytes"_a, "num_experts"_a, "num_entries"_a, "load"_a, "stream"_a = 0);
}

/// The others, likewise.
template <class Use>
void bind_rows(py::module_& m, const std::string& suffix) {
  m.attr("MAX_ROW_ENTRIES") = kernels::kMaxRowEntries;
  m.attr("MAX_COUNTED_EXPERTS") = kernels::kMaxCountedExperts;
  bind_entries<Use>(m, suffix);
  m.def(
      ("spread_rows" + suffix).c_str(),
      [](int64_t num_rows, int64_t row_bytes, int num_topk, uintptr_t slots, uintptr_t x, uintptr_t scales,
         uintptr_t out, uintptr_t stream) {
        if (scales != 0 && row_bytes % (2 * kernels::kScaleGroup) != 0)
          throw std::invalid_argument("row_bytes: a multiple of 256 with scales");
        const kernels::SpreadRowsArgs args{.rows = row_span(num_rows, row_bytes, num_topk, slots),
                                           .x = pointer<const std::byte>(x),
                                           .scales = pointer<const float>(scales),
                                           .out = pointer<std::byte>(out)};
        return Use::spread_rows(args, pointer<void>(stream));
      },
      py::kw_only(), "num_rows"_a, "row_bytes"_a, "num_topk"_a, "slots"_a, "x"_a, "scales"_a = 0, "out"_a,
      "stream"_a = 0);
  m.def(
      ("cast_rows" + suffix).c_str(),
      [](int64_t num_channels, uintptr_t x, uintptr_t values, uintptr_t scales, uintptr_t stream) {
        if (num_channels < 0 || num_channels % kernels::kScaleGroup != 0)
          throw std::invalid_argument("num_channels: a multiple of 128");
        const kernels::CastRowsArgs args{.num_channels = num_channels,
                                         .x = pointer<const std::byte>(x),
                                         .values = pointer<std::byte>(values),
                                         .scales = pointer<float>(scales)};
        return Use::cast_rows(args, pointer<void>(stream));
      },
      py::kw_only(), "num_channels"_a, "x"_a, "values"_a, "scales"_a, "stream"_a = 0);
  m.def(
      ("reduce_rows" + suffix).c_str(),
      [](int64_t num_rows, int64_t row_bytes, int num_topk, uintptr_t slots, uintptr_t y, uintptr_t weights,
         uintptr_t out, uintptr_t stream) {
        const kernels::ReduceRowsArgs args{row_span(num_rows, row_bytes, num_topk, slots),
                                           pointer<const std::byte>(y), pointer<const float>(weights),
                                           pointer<std::byte>(out)};
        return Use::reduce_rows(args, pointer<void>(stream));
      },
      py::kw_only(), "num_rows"_a, "row_bytes"_a, "num_topk"_a, "slots"_a, "y"_a, "weights"_a, "out"_a,
      "stream"_a = 0);
  m.def(
      ("weigh_rows" + suffix).c_str(),
      [](int64_t num_rows, int64_t row_bytes, int num_topk, uintptr_t slots, uintptr_t grad, uintptr_t y,
         uintptr_t weights, uintptr_t out, uintptr_t out_weights, uintptr_t stream) {
        const kernels::WeighRowsArgs args{.rows = row_span(num_rows, row_bytes, num_topk, slots),
                                          .grad = pointer<const std::byte>(grad),
                                          .y = pointer<const std::byte>(y),
                                          .weights = pointer<const float>(weights),
                                          .out = pointer<std::byte>(out),
                                          .out_weights = pointer<float>(out_weights)};
        return Use::weigh_rows(args, pointer<void>(stream));
      },
      py::kw_only(), "num_rows"_a, "row_bytes"_a, "num_topk"_a, "slots"_a, "grad"_a, "y"_a, "weights"_a,
      "out"_a, "out_weights"_a, "stream"_a = 0);
  m.def(
      ("swiglu" + suffix).c_str(),
      [](int64_t num_rows, int64_t width, uintptr_t h, uintptr_t out, uintptr_t stream) {
        return Use::swiglu(swiglu_args(num_rows, width, h, 0, out), pointer<void>(stream));
      },
      py::kw_only(), "num_rows"_a, "width"_a, "h"_a, "out"_a, "stream"_a = 0);
  m.def(
      ("swiglu_backward" + suffix).c_str(),
      [](int64_t num_rows, int64_t width, uintptr_t h, uintptr_t grad, uintptr_t out, uintptr_t stream) {
        return Use::swiglu_backward(swiglu_args(num_rows, width, h, grad, out), pointer<void>(stream));
      },
      py::kw_only(), "num_rows"_a, "width"_a, "h"_a, "grad"_a, "out"_a, "stream"_a = 0);
}

}  // namespace deepep::bindings
