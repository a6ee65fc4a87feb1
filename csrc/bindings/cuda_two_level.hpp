// What Python sees of the two-level operations on a GPU, and of puts between virtual ranks.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "bindings/two_level.hpp"
#include "host/cuda_two_level.hpp"

namespace deepep::bindings {

using CudaTwoLevelDomain = host::TwoLevelDomain<host::CudaTwoLevelLauncher>;

/// A queue of puts as Python holds it: memory of a rank's device, zero at first.
struct PutQueueMemory {
  uintptr_t orders;
  uint32_t num_orders;
  uintptr_t state;

  [[nodiscard]] dev::PutQueue queue() const {
    return {pointer<dev::PutOrder>(orders), pointer<dev::PutQueueState>(state), num_orders - 1};
  }
};

[[nodiscard]] inline uint64_t nanoseconds(double seconds) { return static_cast<uint64_t>(seconds * 1e9); }

/// Returns the class, for what all domains of a GPU have.
inline py::class_<CudaTwoLevelDomain> bind_cuda_two_level(py::module_& m) {
  using Domain = CudaTwoLevelDomain;
  using Shape = host::TwoLevelShape;
  bind_two_level_shape(m);
  m.attr("PUT_ORDER_BYTES") = sizeof(dev::PutOrder);
  m.attr("PUT_QUEUE_STATE_BYTES") = sizeof(dev::PutQueueState);
  py::class_<PutQueueMemory>(m, "PutQueue")
      .def(py::init<uintptr_t, uint32_t, uintptr_t>(), py::kw_only(), "orders"_a, "num_orders"_a, "state"_a);
  using Launches = virtual_ranks::Launches;
  py::class_<Launches, std::shared_ptr<Launches>>(m, "VirtualLaunches")
      .def(py::init<>())
      .def(
          "launch", [](Launches& all, uintptr_t stream) { virtual_ranks::launch(all, pointer<void>(stream)); },
          "stream"_a, py::call_guard<py::gil_scoped_release>(),
          "Launches what virtual ranks have gathered here, all in one, and waits for its end.");
  py::class_<Domain> domain(m, "TwoLevelDomain", py::module_local());
  domain.def(py::init([](const Shape& shape, int rank, const std::vector<uintptr_t>& heaps, uintptr_t remote,
                         const PutQueueMemory& puts, uintptr_t serve, const std::vector<int>& pes,
                         uintptr_t before, int64_t max_tokens, uintptr_t state, uintptr_t rail_state,
                         uintptr_t fault, double timeout_seconds, std::shared_ptr<host::Turns> turns,
                         std::shared_ptr<Launches> gathered) {
               host::TwoLevelOptions options = two_level_options(shape, rank, heaps, remote, before, max_tokens,
                                                                 state, rail_state, fault, timeout_seconds);
               options.wire = puts.queue();
               put_server::PutService service{.queue = puts.queue(),
                                              .timeout_ns = nanoseconds(timeout_seconds)};
               for (size_t r = 0; r < pes.size() && r < layout::kMaxGroupRanks; ++r) service.pe[r] = pes[r];
               return std::make_unique<Domain>(options, std::move(turns),
                                               reinterpret_cast<put_server::ServePuts>(serve), service,
                                               std::move(gathered));
             }),
             py::kw_only(), "shape"_a, "rank"_a, "heaps"_a, "remote"_a, "puts"_a, "serve"_a = 0,
             "pes"_a = std::vector<int>{}, "before"_a, "max_tokens"_a, "state"_a, "rail_state"_a, "fault"_a,
             "timeout_seconds"_a, "turns"_a, "gathered"_a = nullptr);
  bind_two_level_operations(domain);
  domain.def("has_copies_under_way", [](const Domain&) { return false; }, "No copy engine has a part here.");
  m.def(
      "serve_puts_locally",
      [](const std::vector<PutQueueMemory>& puts, const std::vector<uintptr_t>& remotes,
         const std::vector<uint32_t>& silent_from, double timeout_seconds, double delay_seconds, uint64_t seed,
         uintptr_t stream) {
        if (puts.size() > put_server::kMaxVirtualRanks || remotes.size() != puts.size() ||
            silent_from.size() != puts.size())
          throw std::invalid_argument("a queue, an address and a number for each of at most 64 ranks");
        put_server::LocalService service{.num_ranks = static_cast<int>(puts.size()),
                                         .timeout_ns = nanoseconds(timeout_seconds),
                                         .delay_ns = nanoseconds(delay_seconds),
                                         .seed = seed};
        for (size_t r = 0; r < puts.size(); ++r) {
          service.queue[r] = puts[r].queue();
          service.remote[r] = pointer<std::byte>(remotes[r]);
          service.silent_from[r] = silent_from[r];
        }
        put_server::serve_locally(service, pointer<void>(stream));
      },
      py::kw_only(), "puts"_a, "remotes"_a, "silent_from"_a, "timeout_seconds"_a, "delay_seconds"_a, "seed"_a,
      "stream"_a, "Launches, on a stream, what serves the puts of virtual ranks until each has ended a call.");
  return domain;
}

}  // namespace deepep::bindings
