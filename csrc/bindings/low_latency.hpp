// A LowLatencyDomain's operations with the names of their arguments, for deepep._cuda and deepep._emulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "bindings/named_arguments.hpp"
#include "host/low_latency.hpp"

namespace deepep::bindings {

// clang-format off
inline constexpr Parameter<host::LowLatencyDispatchCall> kLowLatencyDispatch[] = {
    parameter<host::LowLatencyDispatchCall>("num_blocks", [](auto& c) -> auto& { return c.num_blocks; }),
    parameter<host::LowLatencyDispatchCall>("halves", [](auto& c) -> auto& { return c.halves; }),
    parameter<host::LowLatencyDispatchCall>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<host::LowLatencyDispatchCall>("max_tokens", [](auto& c) -> auto& { return c.args.max_tokens; }),
    parameter<host::LowLatencyDispatchCall>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<host::LowLatencyDispatchCall>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<host::LowLatencyDispatchCall>("hidden", [](auto& c) -> auto& { return c.args.hidden; }),
    parameter<host::LowLatencyDispatchCall>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<host::LowLatencyDispatchCall>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<host::LowLatencyDispatchCall>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<host::LowLatencyDispatchCall>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<host::LowLatencyDispatchCall>("identity", [](auto& c) -> auto& { return c.args.handle.identity; }),
    parameter<host::LowLatencyDispatchCall>("send_position", [](auto& c) -> auto& { return c.args.handle.send_position; }),
    parameter<host::LowLatencyDispatchCall>("num_messages", [](auto& c) -> auto& { return c.args.handle.num_messages; }),
    parameter<host::LowLatencyDispatchCall>("routes", [](auto& c) -> auto& { return c.args.handle.routes; }),
    parameter<host::LowLatencyDispatchCall>("casts", [](auto& c) -> auto& { return c.args.casts; }),
    parameter<host::LowLatencyDispatchCall>("rounds_scales", [](auto& c) -> auto& { return c.args.rounds_scales; }),
    parameter<host::LowLatencyDispatchCall>("packs_scales", [](auto& c) -> auto& { return c.args.packs_scales; }),
    parameter<host::LowLatencyDispatchCall>("recv_x", [](auto& c) -> auto& { return c.args.recv_x; }),
    parameter<host::LowLatencyDispatchCall>("recv_scales", [](auto& c) -> auto& { return c.args.recv_scales; }),
    parameter<host::LowLatencyDispatchCall>("recv_count", [](auto& c) -> auto& { return c.args.recv_count; }),
    parameter<host::LowLatencyDispatchCall>("recv_source", [](auto& c) -> auto& { return c.args.recv_source; }),
    parameter<host::LowLatencyDispatchCall>("recv_range", [](auto& c) -> auto& { return c.args.recv_range; }),
    parameter<host::LowLatencyDispatchCall>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<host::LowLatencyDispatchCall>("refused", [](auto& c) -> auto& { return c.args.refused; }, "False"),
};

inline constexpr Parameter<host::LowLatencyCombineCall> kLowLatencyCombine[] = {
    parameter<host::LowLatencyCombineCall>("num_blocks", [](auto& c) -> auto& { return c.num_blocks; }),
    parameter<host::LowLatencyCombineCall>("halves", [](auto& c) -> auto& { return c.halves; }),
    parameter<host::LowLatencyCombineCall>("num_tokens", [](auto& c) -> auto& { return c.args.num_tokens; }),
    parameter<host::LowLatencyCombineCall>("max_tokens", [](auto& c) -> auto& { return c.args.max_tokens; }),
    parameter<host::LowLatencyCombineCall>("num_topk", [](auto& c) -> auto& { return c.args.num_topk; }),
    parameter<host::LowLatencyCombineCall>("num_local_experts", [](auto& c) -> auto& { return c.args.num_local_experts; }),
    parameter<host::LowLatencyCombineCall>("hidden", [](auto& c) -> auto& { return c.args.hidden; }),
    parameter<host::LowLatencyCombineCall>("index_bytes", [](auto& c) -> auto& { return c.args.index_bytes; }),
    parameter<host::LowLatencyCombineCall>("x", [](auto& c) -> auto& { return c.args.x; }),
    parameter<host::LowLatencyCombineCall>("topk_idx", [](auto& c) -> auto& { return c.args.topk_idx; }),
    parameter<host::LowLatencyCombineCall>("topk_weights", [](auto& c) -> auto& { return c.args.topk_weights; }),
    parameter<host::LowLatencyCombineCall>("identity", [](auto& c) -> auto& { return c.args.handle.identity; }),
    parameter<host::LowLatencyCombineCall>("send_position", [](auto& c) -> auto& { return c.args.handle.send_position; }),
    parameter<host::LowLatencyCombineCall>("num_messages", [](auto& c) -> auto& { return c.args.handle.num_messages; }),
    parameter<host::LowLatencyCombineCall>("routes", [](auto& c) -> auto& { return c.args.handle.routes; }),
    parameter<host::LowLatencyCombineCall>("weights_travelled", [](auto& c) -> auto& { return c.args.weights_travelled; }),
    parameter<host::LowLatencyCombineCall>("out", [](auto& c) -> auto& { return c.args.out; }),
    parameter<host::LowLatencyCombineCall>("stream", [](auto& c) -> auto& { return c.stream; }, "0"),
    parameter<host::LowLatencyCombineCall>("refused", [](auto& c) -> auto& { return c.args.refused; }, "False"),
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

/// Of the memory that a LowLatencyDomain is given: bytes, and how many of them are to be zero.
inline std::pair<int64_t, int64_t> low_latency_bytes(int num_ranks, int max_local_experts, int max_tokens,
                                                     int max_topk, int64_t max_row_bytes) {
  const layout::LowLatencySlots slots{num_ranks, max_local_experts, max_tokens, max_topk, max_row_bytes};
  return {slots.bytes(), slots.control_bytes()};
}

}  // namespace deepep::bindings
