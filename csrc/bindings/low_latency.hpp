// A LowLatencyDomain's operations with the names of their arguments, for deepep._cuda and deepep._emulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "bindings/named_arguments.hpp"
#include "host/low_latency.hpp"
#include "host/low_latency_far.hpp"

namespace deepep::bindings {

using DispatchCall = host::LowLatencyDispatchCall;
using CombineCall = host::LowLatencyCombineCall;

// clang-format off
inline constexpr Parameter<host::LowLatencyDispatchCall> kLowLatencyDispatch[] = {
    parameter<DispatchCall>("num_blocks", [](auto& c) -> auto& { return c.num_blocks; }),
    parameter<DispatchCall>("halves", [](auto& c) -> auto& { return c.halves; }),
    parameter<DispatchCall>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<DispatchCall>("max_tokens", [](auto& c) -> auto& { return c.args.max_tokens; }),
    parameter<DispatchCall>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<DispatchCall>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<DispatchCall>("hidden", [](auto& c) -> auto& { return c.args.hidden; }),
    parameter<DispatchCall>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<DispatchCall>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<DispatchCall>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<DispatchCall>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<DispatchCall>("identity", [](auto& c) -> auto& { return c.args.handle.identity; }),
    parameter<DispatchCall>("sent", [](auto& c) -> auto& { return c.args.handle.sent; }),
    parameter<DispatchCall>("came", [](auto& c) -> auto& { return c.args.handle.came; }),
    parameter<DispatchCall>("routes", [](auto& c) -> auto& { return c.args.handle.routes; }),
    parameter<DispatchCall>("weights_travel", [](auto& c) -> auto& { return c.args.weights_travel; }),
    parameter<DispatchCall>("casts", [](auto& c) -> auto& { return c.args.casts; }),
    parameter<DispatchCall>("rounds_scales", [](auto& c) -> auto& { return c.args.rounds_scales; }),
    parameter<DispatchCall>("packs_scales", [](auto& c) -> auto& { return c.args.packs_scales; }),
    parameter<DispatchCall>("recv_x", [](auto& c) -> auto& { return c.args.recv_x; }),
    parameter<DispatchCall>("recv_scales", [](auto& c) -> auto& { return c.args.recv_scales; }),
    parameter<DispatchCall>("recv_count", [](auto& c) -> auto& { return c.args.recv_count; }),
    parameter<DispatchCall>("recv_source", [](auto& c) -> auto& { return c.args.recv_source; }),
    parameter<DispatchCall>("recv_range", [](auto& c) -> auto& { return c.args.recv_range; }),
    parameter<DispatchCall>("waits", [](auto& c) -> auto& { return c.args.waits; }, "0"),
    parameter<DispatchCall>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<DispatchCall>("refused", [](auto& c) -> auto& { return c.args.refused; }, "False"),
    parameter<DispatchCall>("elsewhere", [](auto& c) -> auto& { return c.args.elsewhere; }, "False"),
};

inline constexpr Parameter<host::LowLatencyCombineCall> kLowLatencyCombine[] = {
    parameter<CombineCall>("num_blocks", [](auto& c) -> auto& { return c.num_blocks; }),
    parameter<CombineCall>("halves", [](auto& c) -> auto& { return c.halves; }),
    parameter<CombineCall>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<CombineCall>("max_tokens", [](auto& c) -> auto& { return c.args.max_tokens; }),
    parameter<CombineCall>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<CombineCall>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<CombineCall>("hidden", [](auto& c) -> auto& { return c.args.hidden; }),
    parameter<CombineCall>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<CombineCall>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<CombineCall>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<CombineCall>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<CombineCall>("identity", [](auto& c) -> auto& { return c.args.handle.identity; }),
    parameter<CombineCall>("sent", [](auto& c) -> auto& { return c.args.handle.sent; }),
    parameter<CombineCall>("came", [](auto& c) -> auto& { return c.args.handle.came; }),
    parameter<CombineCall>("routes", [](auto& c) -> auto& { return c.args.handle.routes; }),
    parameter<CombineCall>("weights_travelled", [](auto& c) -> auto& { return c.args.weights_travelled; }),
    parameter<CombineCall>("returned", [](auto& c) -> auto& { return c.args.returned; }),
    parameter<CombineCall>("out", [](auto& c) -> auto& { return c.args.out; }),
    parameter<CombineCall>("waits", [](auto& c) -> auto& { return c.args.waits; }, "0"),
    parameter<CombineCall>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<CombineCall>("refused", [](auto& c) -> auto& { return c.args.refused; }, "False"),
    parameter<CombineCall>("elsewhere", [](auto& c) -> auto& { return c.args.elsewhere; }, "False"),
};
// clang-format on

template <class Domain>
void bind_low_latency(py::class_<Domain>& domain) {
  NamedMethod<Domain, kLowLatencyDispatch, &Domain::dispatch>::add_to(domain, "dispatch",
                                                                      "Launches a dispatch, or half of one.");
  NamedMethod<Domain, kLowLatencyCombine, &Domain::combine>::add_to(domain, "combine",
                                                                    "Launches a combine, or half of one.");
  domain.def("set_live", &Domain::set_live, py::arg("live"));
}

/// What a LowLatencyDomain is made of, but for what its launcher wants.
inline host::LowLatencyOptions low_latency_options(int rank, const std::vector<uintptr_t>& heaps,
                                                   int max_local_experts, int max_tokens, int max_topk,
                                                   int64_t max_row_bytes, int entry_stretches, uintptr_t state,
                                                   uintptr_t fault, double timeout_seconds, bool shrinks) {
  std::vector<std::byte*> addresses;
  for (const uintptr_t heap : heaps) addresses.push_back(reinterpret_cast<std::byte*>(heap));
  return {.rank = rank,
          .heaps = std::move(addresses),
          .max_local_experts = max_local_experts,
          .max_tokens = max_tokens,
          .max_topk = max_topk,
          .max_row_bytes = max_row_bytes,
          .entry_stretches = entry_stretches,
          .state = reinterpret_cast<kernels::LocalState*>(state),
          .fault = reinterpret_cast<kernels::FaultRecord*>(fault),
          .timeout_seconds = timeout_seconds,
          .shrinks = shrinks};
}

/// The same of ranks in several domains.
inline host::LowLatencyOptions far_low_latency_options(const host::FarShape& shape, int rank,
                                                       const std::vector<uintptr_t>& heaps, uintptr_t state,
                                                       uintptr_t fault, double timeout_seconds) {
  return low_latency_options(rank, heaps, shape.max_local_experts, shape.max_tokens, shape.max_topk,
                             shape.max_row_bytes, shape.entry_stretches, state, fault, timeout_seconds, false);
}

/// Sizes of memory. Local to the module: both have them.
inline void bind_far_shape(py::module_& m) {
  using Shape = host::FarShape;
  m.attr("FAR_STATE_BYTES") = sizeof(kernels::FarState);
  m.attr("FAR_COUNTERS") = offsetof(kernels::FarState, blocks_sent) / sizeof(uint64_t);
  py::class_<Shape>(m, "FarShape", py::module_local())
      .def(py::init([](int num_ranks, int ranks_per_domain, int max_local_experts, int max_tokens, int max_topk,
                       int64_t max_row_bytes, int entry_stretches, bool has_gateways) {
             return Shape{.place = {num_ranks, num_ranks, ranks_per_domain},
                          .max_local_experts = max_local_experts,
                          .max_tokens = max_tokens,
                          .max_topk = max_topk,
                          .max_row_bytes = max_row_bytes,
                          .entry_stretches = entry_stretches,
                          .has_gateways = has_gateways};
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("ranks_per_domain"), py::arg("max_local_experts"),
           py::arg("max_tokens"), py::arg("max_topk"), py::arg("max_row_bytes"), py::arg("entry_stretches") = 0,
           py::arg("has_gateways") = false)
      .def_property_readonly("remote_bytes", [](const Shape& self) { return self.slots().bytes(); })
      .def_property_readonly("control_bytes", [](const Shape& self) { return self.slots().control_bytes(); })
      .def_property_readonly("max_open_puts",
                             [](const Shape&) { return layout::LowLatencyFarSlots::max_open_puts(); })
      .def_property_readonly("num_put_orders", &Shape::num_put_orders)
      .def("signals", &Shape::signals, py::arg("before"),
           "The words that puts raise, as they are after so many calls of either kind: offset and value.");
}

/// Of the memory that a LowLatencyDomain is given: bytes, and how many of them are to be zero.
inline std::pair<int64_t, int64_t> low_latency_bytes(int num_ranks, int max_local_experts, int max_tokens,
                                                     int max_topk, int64_t max_row_bytes, int entry_stretches) {
  const layout::LowLatencySlots slots(num_ranks, max_local_experts, max_tokens, max_topk, max_row_bytes,
                                      entry_stretches);
  return {slots.bytes(), slots.control_bytes()};
}

}  // namespace deepep::bindings
