// deepep._cuda: launches of the kernels for Python. Addresses, sizes and a stream; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "bindings/all_reduce.hpp"
#include "bindings/cuda_low_latency_far.hpp"
#include "bindings/cuda_two_level.hpp"
#include "bindings/domain.hpp"
#include "bindings/exchange.hpp"
#include "bindings/low_latency.hpp"
#include "bindings/rows.hpp"
#include "host/arena.hpp"
#include "host/cuda_launcher.hpp"
#include "host/cuda_low_latency.hpp"
#include "kernels/all_reduce/launch.hpp"
#include "kernels/common/launch.hpp"
#include "kernels/exchange/launch.hpp"
#include "kernels/rows/launch.hpp"

namespace py = pybind11;
namespace dk = deepep::kernels;
using namespace pybind11::literals;
using deepep::bindings::pointer;
using deepep::host::Arena;
using deepep::host::arenas;
using deepep::host::Counts;
using deepep::host::Turns;
using Domain = deepep::host::Domain<deepep::host::CudaLauncher>;
using LowLatencyDomain = deepep::host::LowLatencyDomain<deepep::host::CudaLowLatencyLauncher>;

namespace {

/// See bindings/rows.hpp.
struct RowLaunches {
  static constexpr auto sort_pairs = dk::launch_sort_pairs;
  static constexpr auto select_topk = dk::launch_select_topk;
  static constexpr auto count_entries = dk::launch_count_entries;
  static constexpr auto spread_rows = dk::launch_spread_rows;
  static constexpr auto cast_rows = dk::launch_cast_rows;
  static constexpr auto reduce_rows = dk::launch_reduce_rows;
  static constexpr auto weigh_rows = dk::launch_weigh_rows;
  static constexpr auto swiglu = dk::launch_swiglu;
  static constexpr auto swiglu_backward = dk::launch_swiglu_backward;
};

void bind_turns(py::module_& m) {
  py::class_<Turns, std::shared_ptr<Turns>>(m, "Turns")
      .def(py::init<>())
      .def(
          "follow",
          [](Turns& self, uintptr_t before, uintptr_t stream) {
            self.follow(pointer<void>(before), pointer<void>(stream));
          },
          "before"_a, "stream"_a, "Has what `stream` gets from now on run after what `before` holds now.")
      .def("wait", &Turns::wait, py::call_guard<py::gil_scoped_release>(),
           "Blocks the host, without the GIL, until the last operation has ended.")
      .def("is_idle", &Turns::is_idle, "Whether it has ended.");
}

/// Methods that every domain has: order, and what its kernels have reported.
template <class D>
void bind_order(py::class_<D>& domain) {
  domain
      .def(
          "follow",
          [](D& self, uintptr_t before, uintptr_t stream) {
            self.launcher().turns().follow(pointer<void>(before), pointer<void>(stream));
          },
          "before"_a, "stream"_a, "Has what `stream` gets from now on run after what `before` holds now.")
      .def(
          "wait", [](D& self) { self.launcher().turns().wait(); }, py::call_guard<py::gil_scoped_release>(),
          "Blocks the host, without the GIL, until the last operation has ended.")
      .def(
          "is_idle", [](D& self) { return self.launcher().turns().is_idle(); }, "Whether it has ended.")
      .def("was_captured", [](D& self) { return self.launcher().was_captured(); })
      .def("has_fault", [](D& self) { return deepep::host::has_fault(self.group()); });
}

void bind_domain(py::module_& m) {
  py::class_<Domain> domain(m, "Domain");
  domain.def(py::init([](int rank, const std::vector<uintptr_t>& heaps, int max_local_experts, int max_blocks,
                         int64_t staging_bytes, uintptr_t state, uintptr_t fault, uintptr_t counting,
                         double timeout_seconds, std::shared_ptr<Turns> turns) {
               return std::make_unique<Domain>(
                   deepep::bindings::domain_options(rank, heaps, max_local_experts, max_blocks, staging_bytes,
                                                    state, fault, counting, timeout_seconds),
                   std::move(turns));
             }),
             py::kw_only(), "rank"_a, "heaps"_a, "max_local_experts"_a, "max_blocks"_a, "staging_bytes"_a,
             "state"_a, "fault"_a, "counting"_a = 0, "timeout_seconds"_a, "turns"_a);
  deepep::bindings::bind_operations(domain);
  deepep::bindings::bind_lines(domain);
  bind_order(domain);
  domain.def("has_copies_under_way", [](Domain& self) { return self.launcher().has_copies_under_way(); });
}

/// Methods that the domains of low latency have besides.
template <class D>
void bind_low_latency_faults(py::class_<D>& domain) {
  bind_order(domain);
  domain
      .def(
          "take_fault",
          [](D& self, uintptr_t stream) {
            return self.launcher().take_fault(self.group(), pointer<void>(stream));
          },
          "stream"_a = 0)
      .def(
          "masked", [](D& self) { return deepep::host::masked_ranks(self.group()); },
          "Ranks that kernels have masked, as bits, as far as the host has seen.");
}

void bind_low_latency_domain(py::module_& m) {
  py::class_<LowLatencyDomain> domain(m, "LowLatencyDomain");
  domain.def(py::init([](int rank, const std::vector<uintptr_t>& heaps, int max_local_experts, int max_tokens,
                         int max_topk, int64_t max_row_bytes, int entry_stretches, uintptr_t state,
                         uintptr_t fault, double timeout_seconds, bool shrinks, std::shared_ptr<Turns> turns) {
               return std::make_unique<LowLatencyDomain>(
                   deepep::bindings::low_latency_options(rank, heaps, max_local_experts, max_tokens, max_topk,
                                                         max_row_bytes, entry_stretches, state, fault,
                                                         timeout_seconds, shrinks),
                   std::move(turns));
             }),
             py::kw_only(), "rank"_a, "heaps"_a, "max_local_experts"_a, "max_tokens"_a, "max_topk"_a,
             "max_row_bytes"_a, "entry_stretches"_a, "state"_a, "fault"_a, "timeout_seconds"_a,
             "shrinks"_a = false, "turns"_a);
  deepep::bindings::bind_low_latency(domain);
  deepep::bindings::bind_lines(domain);
  bind_low_latency_faults(domain);
  py::class_<deepep::bindings::CudaFarLowLatencyDomain> far = deepep::bindings::bind_cuda_far_low_latency(m);
  bind_low_latency_faults(far);
  m.attr("MASKED_OFFSET") = offsetof(deepep::kernels::LocalState, masked);
  m.def("low_latency_bytes", &deepep::bindings::low_latency_bytes, "num_ranks"_a, "max_local_experts"_a,
        "max_tokens"_a, "max_topk"_a, "max_row_bytes"_a, "entry_stretches"_a = 0);
}

void bind_two_level_domain(py::module_& m) {
  py::class_<deepep::bindings::CudaTwoLevelDomain> domain = deepep::bindings::bind_cuda_two_level(m);
  bind_order(domain);
}

void bind_counts(py::module_& m) {
  py::class_<Counts>(m, "Counts")
      .def_readonly("phase", &Counts::phase)
      .def_readonly("num_rows", &Counts::num_rows)
      .def_readonly("max_rows", &Counts::max_rows)
      .def_readonly("num_returned", &Counts::num_returned)
      .def_readonly("table", &Counts::table)
      .def_readonly("per_expert", &Counts::per_expert);
  m.def(
      "wait_counts",
      [](uintptr_t address, uint32_t ticket, int num_ranks, int num_local_experts, double timeout_seconds) {
        return deepep::host::wait_counts(pointer<const uint64_t>(address), ticket, num_ranks, num_local_experts,
                                         timeout_seconds);
      },
      "host_counts"_a, "ticket"_a, "num_ranks"_a, "num_local_experts"_a, "timeout_seconds"_a,
      py::call_guard<py::gil_scoped_release>(),
      "Polls, without the GIL, until a dispatch has posted its counts; None at the deadline.");
}

void bind_arena(py::module_& m) {
  m.def(
      "arena_open",
      [](uintptr_t base, int64_t bytes) { return arenas().open(pointer<std::byte>(base), bytes); }, "base"_a,
      "num_bytes"_a);
  m.def(
      "arena_reserve",
      [](int64_t id, int64_t bytes) {
        arenas().select(id);
        void* block = arenas().take(bytes);
        arenas().select(0);
        return reinterpret_cast<uintptr_t>(block);
      },
      "arena"_a, "num_bytes"_a);
  m.def(
      "arena_reserve_tail",
      [](int64_t id, int64_t bytes) {
        return arenas().of(id, [&](Arena& arena) {
          return reinterpret_cast<uintptr_t>(arena.reserve_tail(bytes));
        });
      },
      "arena"_a, "num_bytes"_a);
  m.def(
      "arena_returned",
      [](int64_t id) { return arenas().of(id, [](Arena& arena) { return arena.returned(); }); }, "arena"_a);
  m.def(
      "arena_free_returned",
      [](int64_t id, int64_t count) { arenas().of(id, [&](Arena& arena) { arena.free_returned(count); }); },
      "arena"_a, "count"_a);
  m.def(
      "arena_used", [](int64_t id) { return arenas().of(id, [](Arena& arena) { return arena.used(); }); },
      "arena"_a);
  m.def("arena_close", [](int64_t id) { arenas().close(id); }, "arena"_a);
  m.def("arena_select", [](int64_t id) { arenas().select(id); }, "arena"_a);
}

}  // namespace

/// What torch's CUDAPluggableAllocator calls, by name.
extern "C" __attribute__((visibility("default"))) void* deepep_arena_take(size_t bytes, int, void*) {
  return arenas().take(static_cast<int64_t>(bytes));
}
extern "C" __attribute__((visibility("default"))) void deepep_arena_give_back(void* block, size_t bytes, int,
                                                                              void*) {
  arenas().give_back(block, static_cast<int64_t>(bytes));
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of deepep, for the compute capabilities in ARCHS.";
  m.attr("ARCHS") = DEEPEP_CUDA_ARCHS;
  deepep::bindings::bind_common(m);
  m.attr("CE_COMPLETED") = offsetof(dk::LocalState, ce_completed) / sizeof(uint32_t);  // a word of the state
  bind_turns(m);
  bind_domain(m);
  bind_low_latency_domain(m);
  bind_two_level_domain(m);
  bind_counts(m);
  bind_arena(m);
  m.def(
      "copy",
      [](uintptr_t from, uintptr_t to, int64_t bytes, int num_blocks, uintptr_t stream, bool bulk, int warps,
         int stages, int64_t stage_bytes) {
        if (bulk)
          dk::launch_bulk_copy(pointer<const std::byte>(from), pointer<std::byte>(to), bytes, warps, stages,
                               stage_bytes, num_blocks, pointer<void>(stream));
        else
          dk::launch_copy(pointer<const std::byte>(from), pointer<std::byte>(to), bytes, num_blocks,
                          pointer<void>(stream));
      },
      "source"_a, "target"_a, "num_bytes"_a, "num_blocks"_a, "stream"_a, py::kw_only(), "bulk"_a = false,
      "warps"_a = 4, "stages"_a = 6, "stage_bytes"_a = 8192);
  m.def(
      "hold",
      [](uint64_t nanoseconds, int num_blocks, uintptr_t stream) {
        dk::launch_hold(nanoseconds, num_blocks, pointer<void>(stream));
      },
      "nanoseconds"_a, "num_blocks"_a, "stream"_a);
  deepep::bindings::bind_exchange(m, dk::load_exchange).def(
      "launch",
      [](const deepep::bindings::ExchangeOf& self, uintptr_t source, const std::vector<int64_t>& sent,
         const std::vector<int64_t>& received, uintptr_t sums, int num_blocks, uintptr_t stream) {
        dk::launch_exchange(self.call(source, sent, received, sums, num_blocks), num_blocks,
                            pointer<void>(stream));
      },
      py::kw_only(), "source"_a, "sent"_a, "received"_a, "sums"_a, "num_blocks"_a, "stream"_a);
  deepep::bindings::bind_all_reduce(m, dk::load_all_reduce).def(
      "launch",
      [](const deepep::bindings::AllReduceOf& self, uintptr_t tensor, int64_t count, bool is_bf16,
         bool is_oneshot, const std::string& format, bool is_fixed, float divisor,
         const std::vector<uint32_t>& keys, uint64_t first_index, int num_blocks, uintptr_t stream) {
        dk::launch_all_reduce(self.call(tensor, count, is_bf16, is_oneshot, format, is_fixed, divisor, keys,
                                        first_index, num_blocks),
                              is_oneshot, num_blocks, pointer<void>(stream));
      },
      py::kw_only(), "tensor"_a, "count"_a, "is_bf16"_a, "is_oneshot"_a, "format"_a, "is_fixed"_a, "divisor"_a,
      "keys"_a, "first_index"_a, "num_blocks"_a, "stream"_a);
  deepep::bindings::bind_rows<RowLaunches>(m, "");
  m.def(
      "stream_is_idle", [](uintptr_t stream) { return deepep::host::is_idle(pointer<CUstream_st>(stream)); },
      "stream"_a);
}
