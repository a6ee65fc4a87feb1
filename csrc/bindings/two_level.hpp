// What Python sees of the two-level operations, on a GPU and on the emulator: sizes of their memory, and the
// operations with the names of their arguments.
#pragma once

#include <pybind11/stl.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "bindings/domain.hpp"
#include "host/two_level.hpp"

namespace deepep::bindings {

/// Ranks that Python has as bits of one integer. Throws std::invalid_argument for ranks that no group has.
[[nodiscard]] inline layout::RankMask rank_mask(const py::int_& bits) {
  layout::RankMask mask{};
  py::object left = bits;
  for (uint32_t& word : mask.words) {
    word = (left & py::int_(0xffffffffu)).cast<uint32_t>();
    left = left >> py::int_(32);
  }
  if (!left.equal(py::int_(0))) throw std::invalid_argument("live: a group has at most 256 ranks");
  return mask;
}

using Words = std::vector<std::pair<int64_t, uint64_t>>;

/// Of `before` windows, those that have gone through a half.
[[nodiscard]] inline uint64_t through_half(uint64_t before, int64_t half) {
  return (before + 1 - static_cast<uint64_t>(half)) / 2;
}

[[nodiscard]] inline Words remote_words(const host::TwoLevelShape& shape, uint64_t before) {
  const layout::RailLayout rails = shape.rails();
  Words words;
  for (int64_t rail = 0; rail < rails.num_rails(); ++rail) {
    for (int64_t half = 0; half < 2; ++half) {
      const uint64_t through = through_half(before, half);
      for (const int64_t at : {rails.windows.mailbox_signal(rail, half), rails.digest_signal(rail, half),
                               rails.ask_signal(rail, half), rails.windows.credit(rail, half)})
        words.emplace_back(at, through);
      for (int64_t chunk = 0; chunk < rails.windows.num_chunks(); ++chunk)
        words.emplace_back(rails.windows.arrived(rail, half, chunk), through);
    }
  }
  return words;
}

[[nodiscard]] inline Words heap_words(const host::TwoLevelShape& shape, uint64_t before) {
  const layout::ReturnStaging staging = shape.staging();
  const int64_t begin = shape.control().bytes();
  Words words;
  for (int64_t source = 0; source < staging.num_ranks; ++source)
    for (int64_t half = 0; half < 2; ++half)
      words.emplace_back(begin + staging.summed(source, half), through_half(before, half));
  for (int64_t slot = 0; slot < staging.num_slots; ++slot)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t chunk = 0; chunk < staging.window / layout::kChunkRecords; ++chunk)
        for (int64_t local = 0; local < staging.domain_ranks; ++local)
          words.emplace_back(begin + staging.returned(slot, half, chunk, local), through_half(before, half));
  return words;
}

/// Sizes of memory. Local to the module: both have them.
inline void bind_two_level_shape(py::module_& m) {
  using Shape = host::TwoLevelShape;
  m.attr("MAX_GROUP_RANKS") = layout::kMaxGroupRanks;
  m.attr("MAX_DOMAINS") = layout::kMaxDomains;
  m.attr("RAIL_STATE_BYTES") = sizeof(kernels::RailState);
  m.attr("RAIL_COUNTERS") = offsetof(kernels::RailState, claimed) / sizeof(uint64_t);
  py::class_<Shape>(m, "TwoLevelShape", py::module_local())
      .def(py::init([](int num_ranks, int ranks_per_domain, const py::int_& live, int max_local_experts,
                       int max_blocks, int64_t window, int64_t row_bytes, int num_scales, int num_topk) {
             return Shape{.plan = {layout::Placement(num_ranks, num_ranks, ranks_per_domain), rank_mask(live)},
                          .max_local_experts = max_local_experts,
                          .max_blocks = max_blocks,
                          .window = window,
                          .row_bytes = row_bytes,
                          .num_scales = num_scales,
                          .num_topk = num_topk};
           }),
           py::kw_only(), "num_ranks"_a, "ranks_per_domain"_a, "live"_a, "max_local_experts"_a, "max_blocks"_a,
           "window"_a, "row_bytes"_a, "num_scales"_a, "num_topk"_a)
      .def_property_readonly("heap_bytes", &Shape::heap_bytes)
      .def_property_readonly("words_end",
                             [](const Shape& self) { return self.control().bytes() + self.staging().words(); })
      .def_property_readonly("remote_bytes", [](const Shape& self) { return self.rails().bytes(); })
      .def("remote_words", &remote_words, "before"_a,
           "The words that puts raise, as they are after so many windows and calls: offset and value.")
      .def("heap_words", &heap_words, "before"_a,
           "The same of the words between neighbours, which have 4 bytes.")
      .def_property_readonly("num_put_orders", &Shape::num_put_orders)
      .def_property_readonly("max_open_puts", [](const Shape& self) { return self.rails().max_open_puts(); });
}

/// A rank, and its memory, but for what puts go through.
inline host::TwoLevelOptions two_level_options(const host::TwoLevelShape& shape, int rank,
                                               const std::vector<uintptr_t>& heaps, uintptr_t remote,
                                               uintptr_t before, int64_t max_tokens, uintptr_t state,
                                               uintptr_t rail_state, uintptr_t fault, double timeout_seconds) {
  std::vector<std::byte*> addresses;
  for (const uintptr_t heap : heaps) addresses.push_back(pointer<std::byte>(heap));
  return {.shape = shape,
          .rank = rank,
          .heaps = std::move(addresses),
          .remote = pointer<std::byte>(remote),
          .wire = {},
          .before = pointer<int32_t>(before),
          .max_tokens = max_tokens,
          .state = pointer<kernels::LocalState>(state),
          .rail_state = pointer<kernels::RailState>(rail_state),
          .fault = pointer<kernels::FaultRecord>(fault),
          .timeout_seconds = timeout_seconds};
}

/// The operations. A module adds the constructor, and what only its launcher has.
template <class Domain>
void bind_two_level_operations(py::class_<Domain>& domain) {
  NamedMethod<Domain, kDispatch, &Domain::dispatch>::add_to(domain, "dispatch", "Launches a dispatch.");
  NamedMethod<Domain, kCachedDispatch, &Domain::prepare_cached>::add_to(
      domain, "prepare_cached", "Collects what the cached dispatches along one handle have in common.");
  NamedMethod<Domain, kCombine, &Domain::combine>::add_to(domain, "combine", "Launches a combine.");
  NamedMethod<Domain, kLayout, &Domain::layout>::add_to(domain, "layout", "Launches a dispatch layout.");
  bind_dispatch_cached(domain);
  bind_refusals(domain);
}

}  // namespace deepep::bindings
