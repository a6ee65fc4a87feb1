// What Python sees of the two-level operations on the emulator.
#pragma once

#include <memory>
#include <vector>

#include "bindings/two_level.hpp"
#include "emulator/two_level.hpp"

namespace deepep::bindings {

/// `Kernels`: the module's set of kernels.
template <class Kernels>
void bind_emulated_two_level(py::module_& m) {
  using Shape = host::TwoLevelShape;
  using Domain = host::TwoLevelDomain<emu::TwoLevelLauncher>;
  bind_two_level_shape(m);
  py::class_<Domain> domain(m, "TwoLevelDomain", py::module_local());
  domain.def(py::init([](emu::Simulation& machine, const Kernels& kernels, int num_threads, const Shape& shape,
                         int rank, const std::vector<uintptr_t>& heaps, uintptr_t remote, uintptr_t before,
                         int64_t max_tokens, uintptr_t state, uintptr_t rail_state, uintptr_t fault,
                         double timeout_seconds) {
               return std::make_unique<Domain>(
                   two_level_options(shape, rank, heaps, remote, before, max_tokens, state, rail_state, fault,
                                     timeout_seconds),
                   machine, *kernels.set, rank, num_threads);
             }),
             py::keep_alive<1, 2>(), py::kw_only(), "machine"_a, "kernels"_a, "num_threads"_a, "shape"_a,
             "rank"_a, "heaps"_a, "remote"_a, "before"_a, "max_tokens"_a, "state"_a, "rail_state"_a, "fault"_a,
             "timeout_seconds"_a);
  bind_two_level_operations(domain);
  domain.def("watched_fault", [](Domain& self) { return self.launcher().watched_fault(self.group()); })
      .def_property_readonly("fault_word", [](const Domain& self) {
        return reinterpret_cast<uintptr_t>(&self.group().fault->pending);
      });
}

}  // namespace deepep::bindings
