// deepep._emulator's LowLatencyDomain.
#pragma once

#include <cstring>
#include <memory>
#include <optional>

#include "bindings/lines.hpp"
#include "bindings/low_latency.hpp"
#include "device/e4m3.hpp"
#include "emulator/low_latency.hpp"

namespace deepep::bindings {

/// What a function makes of each item.
template <class From, class To, class Make>
py::bytes each(const std::string& items, const Make& make) {
  std::string made(items.size() / sizeof(From) * sizeof(To), '\0');
  for (size_t i = 0; i < items.size() / sizeof(From); ++i) {
    From item;
    std::memcpy(&item, items.data() + i * sizeof(From), sizeof(From));
    const To result = static_cast<To>(make(item));
    std::memcpy(made.data() + i * sizeof(To), &result, sizeof(To));
  }
  return py::bytes(made);
}

/// The operations of a LowLatencyDomain, and what its host sees of faults. launcher: of a domain.
template <class Domain, class Launcher>
void bind_emulated_operations(py::class_<Domain>& domain, const Launcher& launcher) {
  bind_low_latency(domain);
  domain
      .def_property_readonly(
          "fault_word",
          [](const Domain& self) { return reinterpret_cast<uintptr_t>(&self.group().fault->pending); })
      .def("take_fault", [=](Domain& self) { return launcher(self).take_fault(self.group(), false); })
      .def("masked", [=](Domain& self) { return launcher(self).masked(self.group()); })
      .def("watched_fault", [=](Domain& self) { return launcher(self).take_fault(self.group(), true); });
}

/// Of ranks in several domains.
template <class Kernels>
void bind_emulated_far_low_latency(py::module_& m) {
  bind_far_shape(m);
  using Domain = host::LowLatencyDomain<host::FarLauncher<emu::LowLatencyLauncher>>;
  py::class_<Domain> domain(m, "FarLowLatencyDomain");
  domain.def(
      py::init([](emu::Simulation& machine, const Kernels& kernels, int num_threads,
                  const host::FarShape& shape, int rank, const std::vector<uintptr_t>& heaps, uintptr_t remote,
                  uintptr_t far_state, uintptr_t state, uintptr_t fault, double timeout_seconds,
                  bool bulk_copies) {
        return std::make_unique<Domain>(
            far_low_latency_options(shape, rank, heaps, state, fault, timeout_seconds), shape, rank,
            host::FarMemory{.remote = reinterpret_cast<std::byte*>(remote),
                            .state = reinterpret_cast<kernels::FarState*>(far_state),
                            .wire = {}},
            machine, *kernels.set, rank, num_threads, bulk_copies);
      }),
      py::keep_alive<1, 2>(), py::kw_only(), py::arg("machine"), py::arg("kernels"), py::arg("num_threads"),
      py::arg("shape"), py::arg("rank"), py::arg("heaps"), py::arg("remote"), py::arg("far_state"),
      py::arg("state"), py::arg("fault"), py::arg("timeout_seconds"), py::arg("bulk_copies") = true);
  bind_emulated_operations(domain,
                           [](Domain& self) -> emu::LowLatencyLauncher& { return self.launcher().within(); });
}

/// `Kernels`: a set of kernels as Python holds it.
template <class Kernels>
void bind_emulated_low_latency(py::module_& m) {
  using Domain = host::LowLatencyDomain<emu::LowLatencyLauncher>;
  py::class_<Domain> domain(m, "LowLatencyDomain");
  domain.def(py::init([](emu::Simulation& machine, const Kernels& kernels, int num_threads, int rank,
                         const std::vector<uintptr_t>& heaps, int max_local_experts, int max_tokens,
                         int max_topk, int64_t max_row_bytes, int entry_stretches, uintptr_t state,
                         uintptr_t fault, double timeout_seconds, bool shrinks, bool bulk_copies) {
               const host::LowLatencyOptions options =
                   low_latency_options(rank, heaps, max_local_experts, max_tokens, max_topk, max_row_bytes,
                                       entry_stretches, state, fault, timeout_seconds, shrinks);
               return std::make_unique<Domain>(options, machine, *kernels.set, rank, num_threads,
                                               bulk_copies);
             }),
             py::keep_alive<1, 2>(), py::kw_only(), py::arg("machine"), py::arg("kernels"),
             py::arg("num_threads"), py::arg("rank"), py::arg("heaps"), py::arg("max_local_experts"),
             py::arg("max_tokens"), py::arg("max_topk"), py::arg("max_row_bytes"), py::arg("entry_stretches"),
             py::arg("state"), py::arg("fault"), py::arg("timeout_seconds"), py::arg("shrinks") = false,
             py::arg("bulk_copies") = true);
  bind_emulated_operations(domain, [](Domain& self) -> emu::LowLatencyLauncher& { return self.launcher(); });
  bind_lines(domain);
  bind_emulated_far_low_latency<Kernels>(m);
  m.def("low_latency_bytes", &low_latency_bytes, py::arg("num_ranks"), py::arg("max_local_experts"),
        py::arg("max_tokens"), py::arg("max_topk"), py::arg("max_row_bytes"), py::arg("entry_stretches") = 0);
  m.def(
      "cast_to_e4m3",
      [](const std::string& floats) {
        std::string bytes(floats.size() / 4, '\0');
        for (size_t i = 0; i < bytes.size(); ++i) {
          uint32_t bits = 0;
          std::memcpy(&bits, floats.data() + 4 * i, 4);
          bytes[i] = static_cast<char>(dev::e4m3_of_bits(bits));
        }
        return py::bytes(bytes);
      },
      py::arg("floats"), "A byte for each float32 of `floats`.");
  m.def(
      "logfmt_codes",
      [](const std::string& values, uint32_t meta) {
        const auto group = kernels::LogfmtEncoder::of({meta});
        return each<uint16_t, uint16_t>(values, [&](uint16_t value) { return group.code(value); });
      },
      py::arg("values"), py::arg("meta"),
      "The code, uint16, of each bf16 of `values`, in a group of this `meta`.");
  m.def(
      "logfmt_values",
      [](const std::string& codes, uint32_t meta) {
        const auto group = kernels::LogfmtDecoder::of({meta});
        return each<uint16_t, float>(codes, [&](uint16_t code) { return group.value(code); });
      },
      py::arg("codes"), py::arg("meta"), "The float32 of each code of `codes`, in a group of this `meta`.");
  m.attr("LOW_LATENCY_EPOCHS") = offsetof(kernels::LocalState, barrier_epoch) / sizeof(uint32_t);
}

}  // namespace deepep::bindings
