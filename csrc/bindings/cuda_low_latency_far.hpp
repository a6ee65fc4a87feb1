// What Python sees of the low-latency operations between domains on a GPU.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "bindings/cuda_two_level.hpp"
#include "bindings/low_latency.hpp"
#include "host/cuda_low_latency_far.hpp"

namespace deepep::bindings {

using CudaFarLowLatencyDomain = host::LowLatencyDomain<host::FarLauncher<host::CudaFarLowLatencyLauncher>>;

/// Returns the class, for what low latency's domains have.
inline py::class_<CudaFarLowLatencyDomain> bind_cuda_far_low_latency(py::module_& m) {
  using Domain = CudaFarLowLatencyDomain;
  bind_far_shape(m);
  py::class_<Domain> domain(m, "FarLowLatencyDomain", py::module_local());
  domain.def(py::init([](const host::FarShape& shape, int rank, const std::vector<uintptr_t>& heaps,
                         uintptr_t remote, uintptr_t far_state, const PutQueueMemory& puts, uintptr_t serve,
                         const std::vector<int>& pes, uintptr_t state, uintptr_t fault, double timeout_seconds,
                         std::shared_ptr<host::Turns> turns) {
               put_server::PutService service{.queue = puts.queue(),
                                              .timeout_ns = nanoseconds(timeout_seconds)};
               for (size_t r = 0; r < pes.size() && r < layout::kMaxGroupRanks; ++r) service.pe[r] = pes[r];
               return std::make_unique<Domain>(
                   far_low_latency_options(shape, rank, heaps, state, fault, timeout_seconds), shape, rank,
                   host::FarMemory{.remote = pointer<std::byte>(remote),
                                   .state = pointer<kernels::FarState>(far_state),
                                   .wire = puts.queue()},
                   std::move(turns), reinterpret_cast<put_server::ServePuts>(serve), service);
             }),
             py::kw_only(), "shape"_a, "rank"_a, "heaps"_a, "remote"_a, "far_state"_a, "puts"_a, "serve"_a = 0,
             "pes"_a = std::vector<int>{}, "state"_a, "fault"_a, "timeout_seconds"_a, "turns"_a);
  bind_low_latency(domain);
  return domain;
}

}  // namespace deepep::bindings
