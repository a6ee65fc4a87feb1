// What deepep._cuda and deepep._emulator have in common: a Domain's operations with the names of their
// arguments, what passes between them, and sizes of the memory that a Domain is given.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/lines.hpp"
#include "bindings/named_arguments.hpp"
#include "host/counts.hpp"
#include "host/domain.hpp"
#include "host/launches.hpp"

namespace deepep::bindings {

using namespace pybind11::literals;
using host::CombineLaunch;
using host::DispatchLaunch;
using host::LayoutLaunch;
using host::RingLaunch;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// clang-format off
inline constexpr Parameter<DispatchLaunch> kDispatch[] = {
    parameter<DispatchLaunch>("blocks", [](auto& c) -> auto& { return c.blocks; }),
    parameter<DispatchLaunch>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<DispatchLaunch>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<DispatchLaunch>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<DispatchLaunch>("num_scales", [](auto& c) -> auto& { return c.args.num_scales; }),
    parameter<DispatchLaunch>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<DispatchLaunch>("row_bytes", [](auto& c) -> auto& { return c.args.row_bytes; }),
    parameter<DispatchLaunch>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<DispatchLaunch>("scales", [](auto& c) -> auto& { return c.args.scales; }),
    parameter<DispatchLaunch>("scale_strides", [](auto& c) -> auto& { return c.args.scale_strides; }),
    parameter<DispatchLaunch>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<DispatchLaunch>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<DispatchLaunch>("is_token_in_rank", [](auto& c) -> auto& { return c.args.is_token_in_rank; }),
    parameter<DispatchLaunch>("tokens_per_rank", [](auto& c) -> auto& { return c.args.tokens_per_rank; }),
    parameter<DispatchLaunch>("tokens_per_expert", [](auto& c) -> auto& { return c.args.tokens_per_expert; }),
    parameter<DispatchLaunch>("counts", [](auto& c) -> auto& { return c.args.counts; }),
    parameter<DispatchLaunch>("send_row", [](auto& c) -> auto& { return c.args.send_row; }),
    parameter<DispatchLaunch>("recv_x", [](auto& c) -> auto& { return c.received[layout::kSlotRows]; }),
    parameter<DispatchLaunch>("recv_source", [](auto& c) -> auto& { return c.received[layout::kSlotSource]; }),
    parameter<DispatchLaunch>("recv_scales", [](auto& c) -> auto& { return c.received[layout::kSlotScales]; }),
    parameter<DispatchLaunch>("recv_topk_idx",
                              [](auto& c) -> auto& { return c.received[layout::kSlotIndices]; }),
    parameter<DispatchLaunch>("recv_topk_weights",
                              [](auto& c) -> auto& { return c.received[layout::kSlotWeights]; }),
    parameter<DispatchLaunch>("capacity", [](auto& c) -> auto& { return c.args.slot_capacity; }),
    parameter<DispatchLaunch>("num_worst_tokens", [](auto& c) -> auto& { return c.args.num_worst_tokens; }),
    parameter<DispatchLaunch>("host_counts", [](auto& c) -> auto& { return c.args.host; }),
    parameter<DispatchLaunch>("ticket", [](auto& c) -> auto& { return c.args.ticket; }),
    parameter<DispatchLaunch>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<DispatchLaunch>("payload", [](auto& c) -> auto& { return c.args.payload; }, "0"),
};

inline constexpr Parameter<DispatchLaunch> kTopkDispatch[] = {
    parameter<DispatchLaunch>("blocks", [](auto& c) -> auto& { return c.blocks; }),
    parameter<DispatchLaunch>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<DispatchLaunch>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<DispatchLaunch>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<DispatchLaunch>("num_scales", [](auto& c) -> auto& { return c.args.num_scales; }),
    parameter<DispatchLaunch>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<DispatchLaunch>("row_bytes", [](auto& c) -> auto& { return c.args.row_bytes; }),
    parameter<DispatchLaunch>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<DispatchLaunch>("scales", [](auto& c) -> auto& { return c.args.scales; }),
    parameter<DispatchLaunch>("scale_strides", [](auto& c) -> auto& { return c.args.scale_strides; }),
    parameter<DispatchLaunch>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<DispatchLaunch>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<DispatchLaunch>("is_token_in_rank", [](auto& c) -> auto& { return c.args.marks; }),
    parameter<DispatchLaunch>("alone_tokens", [](auto& c) -> auto& { return c.args.alone_tokens; }),
    parameter<DispatchLaunch>("counts", [](auto& c) -> auto& { return c.args.counts; }),
    parameter<DispatchLaunch>("send_row", [](auto& c) -> auto& { return c.args.send_row; }),
    parameter<DispatchLaunch>("recv_x", [](auto& c) -> auto& { return c.received[layout::kSlotRows]; }),
    parameter<DispatchLaunch>("recv_source", [](auto& c) -> auto& { return c.received[layout::kSlotSource]; }),
    parameter<DispatchLaunch>("recv_scales", [](auto& c) -> auto& { return c.received[layout::kSlotScales]; }),
    parameter<DispatchLaunch>("recv_topk_idx",
                              [](auto& c) -> auto& { return c.received[layout::kSlotIndices]; }),
    parameter<DispatchLaunch>("recv_topk_weights",
                              [](auto& c) -> auto& { return c.received[layout::kSlotWeights]; }),
    parameter<DispatchLaunch>("capacity", [](auto& c) -> auto& { return c.args.slot_capacity; }),
    parameter<DispatchLaunch>("num_worst_tokens", [](auto& c) -> auto& { return c.args.num_worst_tokens; }),
    parameter<DispatchLaunch>("host_counts", [](auto& c) -> auto& { return c.args.host; }),
    parameter<DispatchLaunch>("ticket", [](auto& c) -> auto& { return c.args.ticket; }),
    parameter<DispatchLaunch>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<DispatchLaunch>("payload", [](auto& c) -> auto& { return c.args.payload; }, "0"),
    parameter<DispatchLaunch>("expanded", [](auto& c) -> auto& { return c.expanded; }, "None"),
};

inline constexpr Parameter<DispatchLaunch> kCachedDispatch[] = {
    parameter<DispatchLaunch>("blocks", [](auto& c) -> auto& { return c.blocks; }),
    parameter<DispatchLaunch>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<DispatchLaunch>("num_scales", [](auto& c) -> auto& { return c.args.num_scales; }),
    parameter<DispatchLaunch>("row_bytes", [](auto& c) -> auto& { return c.args.row_bytes; }),
    parameter<DispatchLaunch>("scale_strides", [](auto& c) -> auto& { return c.args.scale_strides; }),
    parameter<DispatchLaunch>("counts", [](auto& c) -> auto& { return c.args.counts; }),
    parameter<DispatchLaunch>("send_row", [](auto& c) -> auto& { return c.args.send_row; }),
    parameter<DispatchLaunch>("capacity", [](auto& c) -> auto& { return c.args.slot_capacity; }),
    parameter<DispatchLaunch>("payload", [](auto& c) -> auto& { return c.args.payload; }, "0"),
};

inline constexpr Parameter<CombineLaunch> kCombine[] = {
    parameter<CombineLaunch>("blocks", [](auto& c) -> auto& { return c.blocks; }),
    parameter<CombineLaunch>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<CombineLaunch>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<CombineLaunch>("row_bytes", [](auto& c) -> auto& { return c.args.row_bytes; }),
    parameter<CombineLaunch>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<CombineLaunch>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<CombineLaunch>("bias_0", [](auto& c) -> auto& { return c.args.bias[0]; }),
    parameter<CombineLaunch>("bias_1", [](auto& c) -> auto& { return c.args.bias[1]; }),
    parameter<CombineLaunch>("counts", [](auto& c) -> auto& { return c.args.counts; }),
    parameter<CombineLaunch>("send_row", [](auto& c) -> auto& { return c.args.send_row; }),
    parameter<CombineLaunch>("out", [](auto& c) -> auto& { return c.args.out; }),
    parameter<CombineLaunch>("out_weights", [](auto& c) -> auto& { return c.args.out_weights; }),
    parameter<CombineLaunch>("known", [](auto& c) -> auto& { return c.known; }, "None"),
    parameter<CombineLaunch>("ce_chunks", [](auto& c) -> auto& { return c.chunks.num_chunks; }, "0"),
    parameter<CombineLaunch>("ce_shrink", [](auto& c) -> auto& { return c.chunks.shrink; }, "100"),
    parameter<CombineLaunch>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<CombineLaunch>("source_token", [](auto& c) -> auto& { return c.source_token; }, "0"),
    parameter<CombineLaunch>("num_entries", [](auto& c) -> auto& { return c.args.num_entries; }, "0"),
    parameter<CombineLaunch>("slots", [](auto& c) -> auto& { return c.args.slots; }, "0"),
    parameter<CombineLaunch>("factors", [](auto& c) -> auto& { return c.args.factors; }, "0"),
};

inline constexpr Parameter<LayoutLaunch> kLayout[] = {
    parameter<LayoutLaunch>("num_blocks", [](auto& c) -> auto& { return c.num_blocks; }),
    parameter<LayoutLaunch>("num_ranks", [](auto& c) -> auto& { return c.args.num_ranks; }),
    parameter<LayoutLaunch>("num_experts", [](auto& c) -> auto& { return c.args.num_experts; }),
    parameter<LayoutLaunch>("ranks_per_domain", [](auto& c) -> auto& { return c.args.ranks_per_domain; }),
    parameter<LayoutLaunch>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<LayoutLaunch>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<LayoutLaunch>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<LayoutLaunch>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<LayoutLaunch>("tokens_per_rank", [](auto& c) -> auto& { return c.args.tokens_per_rank; }),
    parameter<LayoutLaunch>("tokens_per_domain", [](auto& c) -> auto& { return c.args.tokens_per_domain; }),
    parameter<LayoutLaunch>("tokens_per_expert", [](auto& c) -> auto& { return c.args.tokens_per_expert; }),
    parameter<LayoutLaunch>("is_token_in_rank", [](auto& c) -> auto& { return c.args.is_token_in_rank; }),
    parameter<LayoutLaunch>("workspace", [](auto& c) -> auto& { return c.args.workspace; }),
    parameter<LayoutLaunch>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
};
// clang-format on

/// A tensor around a ring.
// clang-format off
inline constexpr Parameter<RingLaunch> kRing[] = {
    parameter<RingLaunch>("peer", [](auto& c) -> auto& { return c.args.peer; }),
    parameter<RingLaunch>("slot", [](auto& c) -> auto& { return c.args.slot; }),
    parameter<RingLaunch>("tensor", [](auto& c) -> auto& { return c.tensor; }),
    parameter<RingLaunch>("num_bytes", [](auto& c) -> auto& { return c.bytes; }),
    parameter<RingLaunch>("dtype", [](auto& c) -> auto& { return c.dtype; }),
    parameter<RingLaunch>("begin", [](auto& c) -> auto& { return c.args.slots.begin; }),
    parameter<RingLaunch>("num_slots", [](auto& c) -> auto& { return c.args.slots.num_slots; }),
    parameter<RingLaunch>("slot_bytes", [](auto& c) -> auto& { return c.args.slots.slot_bytes; }),
    parameter<RingLaunch>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
};
// clang-format on

/// A cached dispatch, of what `prepare_cached` has collected.
template <class Domain>
void bind_dispatch_cached(py::class_<Domain>& domain) {
  domain.def(
      "dispatch_cached",
      [](Domain& self, const host::CachedDispatch& prepared, uintptr_t x, uintptr_t scales, uintptr_t recv_x,
         uintptr_t recv_scales, uintptr_t stream) {
        const host::CachedRows rows{.x = pointer<const std::byte>(x),
                                    .scales = pointer<const uint32_t>(scales),
                                    .recv_x = pointer<std::byte>(recv_x),
                                    .recv_scales = pointer<std::byte>(recv_scales)};
        self.dispatch_cached(prepared, rows, pointer<void>(stream));
      },
      "prepared"_a, "x"_a, "scales"_a, "recv_x"_a, "recv_scales"_a, "stream"_a = 0);
}

/// What a rank posts of a call that it takes no part in, and what kernels have reported.
template <class Domain>
void bind_refusals(py::class_<Domain>& domain) {
  domain
      .def(
          "refuse_dispatch",
          [](Domain& self, uintptr_t counts, uintptr_t stream) {
            self.refuse_dispatch(pointer<int32_t>(counts), pointer<void>(stream));
          },
          "counts"_a, "stream"_a = 0)
      .def(
          "refuse_combine",
          [](Domain& self, uintptr_t counts, uintptr_t stream) {
            self.refuse_combine(pointer<const int32_t>(counts), pointer<void>(stream));
          },
          "counts"_a, "stream"_a = 0)
      .def(
          "take_fault", [](Domain& self, uintptr_t stream) { return self.take_fault(pointer<void>(stream)); },
          "stream"_a = 0);
}

/// The operations. A module adds the constructor, and what only its launcher has.
template <class Domain>
void bind_operations(py::class_<Domain>& domain) {
  NamedMethod<Domain, kDispatch, &Domain::dispatch>::add_to(domain, "dispatch", "Launches a dispatch.");
  NamedMethod<Domain, kTopkDispatch, &Domain::dispatch_topk>::add_to(
      domain, "dispatch_topk", "Launches a dispatch that finds out from top-k indices where tokens go.");
  NamedMethod<Domain, kCachedDispatch, &Domain::prepare_cached>::add_to(
      domain, "prepare_cached", "Collects what the cached dispatches along one handle have in common.");
  NamedMethod<Domain, kCombine, &Domain::combine>::add_to(domain, "combine", "Launches a combine.");
  NamedMethod<Domain, kLayout, &Domain::layout>::add_to(domain, "layout", "Launches a dispatch layout.");
  NamedMethod<Domain, kRing, &Domain::ring_send>::add_to(domain, "ring_send", "Sends a tensor to a neighbour.");
  NamedMethod<Domain, kRing, &Domain::ring_receive>::add_to(domain, "ring_receive",
                                                            "Receives a tensor from a neighbour.");
  bind_dispatch_cached(domain);
  bind_refusals(domain);
  domain
      .def("set_live", &Domain::set_live, "live"_a)
      .def(
          "set_waits", [](Domain& self, uintptr_t waits) { self.set_waits(pointer<int64_t>(waits)); },
          "waits"_a, "Has the calls to come add nanoseconds waited for each rank, [NUM_WAITS, R]; 0: nowhere.")
      .def(
          "barrier", [](Domain& self, uintptr_t stream) { self.barrier(pointer<void>(stream)); },
          "stream"_a = 0);
}

/// What a Domain is made of, but for what its launcher wants.
inline host::DomainOptions domain_options(int rank, const std::vector<uintptr_t>& heaps, int max_local_experts,
                                          int max_blocks, int64_t staging_bytes, uintptr_t state,
                                          uintptr_t fault, uintptr_t counting, double timeout_seconds) {
  std::vector<std::byte*> addresses;
  for (const uintptr_t heap : heaps) addresses.push_back(pointer<std::byte>(heap));
  return {.rank = rank,
          .heaps = std::move(addresses),
          .max_local_experts = max_local_experts,
          .max_blocks = max_blocks,
          .staging_bytes = staging_bytes,
          .state = pointer<kernels::LocalState>(state),
          .fault = pointer<kernels::FaultRecord>(fault),
          .counting = pointer<std::byte>(counting),
          .timeout_seconds = timeout_seconds};
}

/// Types that pass between the operations, and sizes.
inline void bind_common(py::module_& m) {
  using kernels::FaultRecord;
  bind_line_constants(m);
  m.attr("STATE_BYTES") = sizeof(kernels::LocalState);
  m.attr("FAULT_BYTES") = sizeof(FaultRecord);
  m.attr("MAX_RANKS") = layout::kMaxRanks;
  m.attr("NUM_WAITS") = static_cast<int>(kernels::Waited::kNumKinds);
  m.attr("MAX_NUMBERED_EXPERTS") = layout::kMaxNumberedExperts;
  m.attr("MAX_COUNTED_TOKENS") = layout::kMaxStretches * layout::kStretch;
  m.def(
      "counting_bytes",
      [](int num_ranks, int max_local_experts) {
        return layout::CountingLayout{num_ranks}.bytes(max_local_experts);
      },
      "num_ranks"_a, "max_local_experts"_a);
  // Local to a module: both have them.
  py::class_<kernels::ExpandedRows>(m, "ExpandedRows", py::module_local())
      .def(py::init([](uintptr_t places, uintptr_t recv_places, uintptr_t x, uintptr_t scales,
                       uintptr_t weights, uintptr_t slots, uintptr_t expert_counts, uintptr_t overflow,
                       uintptr_t origins, uintptr_t tiles, int64_t capacity, int alignment,
                       bool column_major, bool zero_padding) {
             if (capacity < 0 || alignment < 1) throw std::invalid_argument("capacity or alignment");
             return kernels::ExpandedRows{.places = pointer<int32_t>(places),
                                          .recv_places = pointer<std::byte>(recv_places),
                                          .x = pointer<std::byte>(x),
                                          .scales = pointer<uint32_t>(scales),
                                          .weights = pointer<uint32_t>(weights),
                                          .slots = pointer<uint64_t>(slots),
                                          .expert_counts = pointer<int32_t>(expert_counts),
                                          .overflow = pointer<uint32_t>(overflow),
                                          .origins = pointer<int32_t>(origins),
                                          .tiles = pointer<uint32_t>(tiles),
                                          .capacity = capacity,
                                          .alignment = alignment,
                                          .column_major = column_major,
                                          .zero_padding = zero_padding};
           }),
           py::kw_only(), "places"_a, "recv_places"_a, "x"_a, "scales"_a, "weights"_a, "slots"_a,
           "expert_counts"_a, "overflow"_a, "origins"_a, "tiles"_a, "capacity"_a, "alignment"_a,
           "column_major"_a, "zero_padding"_a);
  py::class_<host::CachedDispatch>(m, "CachedDispatch", py::module_local());
  py::class_<host::RowCounts>(m, "RowCounts", py::module_local())
      .def(py::init([](std::vector<int32_t> counts) { return host::RowCounts{std::move(counts)}; }),
           "counts"_a)
      .def("tolist", [](const host::RowCounts& self) { return self.counts; });
  py::class_<FaultRecord>(m, "FaultRecord", py::module_local())
      .def_readonly("operation", &FaultRecord::operation)
      .def_readonly("phase", &FaultRecord::phase)
      .def_property_readonly("missing",
                             [](const FaultRecord& self) {
                               py::object ranks = py::int_(self.missing);
                               for (int word = 0; word < layout::kMaskWords; ++word)
                                 ranks = ranks | (py::int_(self.missing_of_group[word]) << py::int_(32 * word));
                               return ranks;
                             })
      .def_readonly("expected", &FaultRecord::expected)
      .def_readonly("seen", &FaultRecord::seen);
  m.def(
      "ring_bytes",
      [](int num_slots, int64_t slot_bytes) {
        const layout::RingSlots slots{.begin = 0, .num_slots = num_slots, .slot_bytes = slot_bytes};
        return std::pair{slots.word_bytes(), slots.bytes()};
      },
      "num_slots"_a, "slot_bytes"_a, "Bytes of a ring's words, which begin as zeros, and of all its memory.");
  m.def("host_counts_bytes", &host::host_counts_bytes, "num_ranks"_a, "num_local_experts"_a);
  m.def(
      "control_bytes",
      [](int num_ranks, int max_local_experts, int max_blocks) {
        return layout::ControlLayout{num_ranks, max_local_experts, max_blocks}.bytes();
      },
      "num_ranks"_a, "max_local_experts"_a, "max_blocks"_a);
  m.def(
      "staging_capacity",
      [](int64_t area_bytes, int64_t row_bytes, int num_topk) {
        return layout::StagingLayout{area_bytes, row_bytes, num_topk}.capacity();
      },
      "area_bytes"_a, "row_bytes"_a, "num_topk"_a);
}

}  // namespace deepep::bindings
