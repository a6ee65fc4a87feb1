// deepep._emulator: the emulated machine for Python. Addresses and bytes; no torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings/all_reduce.hpp"
#include "bindings/domain.hpp"
#include "bindings/emulator_low_latency.hpp"
#include "bindings/emulator_two_level.hpp"
#include "bindings/exchange.hpp"
#include "bindings/rows.hpp"
#include "emulator/launcher.hpp"
#include "emulator/litmus/litmus.hpp"
#include "emulator/run/simulation.hpp"
#include "kernels/copy/bulk_copy.hpp"
#include "kernels/copy/copy.hpp"

namespace py = pybind11;
namespace dk = deepep::kernels;
namespace emu = deepep::emu;
namespace layout = deepep::layout;
using namespace pybind11::literals;
using deepep::bindings::pointer;
using Domain = deepep::host::Domain<emu::EmulatorLauncher>;

extern "C" emu::KernelSet* deepep_emulator_kernels();
// The compiler leaves out members that are named in template arguments alone.
template class deepep::host::TwoLevelDomain<emu::TwoLevelLauncher>;

namespace {

/// A set of kernels as Python holds it. Its library is never unloaded: failures keep names that live in it.
struct Kernels {
  const emu::KernelSet* set;
};

Kernels load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  auto* entry = reinterpret_cast<emu::KernelSet* (*)()>(dlsym(library, "deepep_emulator_kernels"));
  if (entry == nullptr) throw std::runtime_error(path + " holds no kernels for the emulator");
  emu::KernelSet* set = entry();
  set->others = deepep_emulator_kernels();
  return {set};
}

emu::Strategy strategy_named(const std::string& name) {
  if (name == "random") return emu::Strategy::random;
  if (name == "pct") return emu::Strategy::pct;
  if (name == "starve") return emu::Strategy::starve;
  throw std::invalid_argument("strategy: got " + name + "; allowed: random, pct or starve");
}

emu::Space space_named(const std::string& name) {
  if (name == "symmetric") return emu::Space::symmetric;
  if (name == "device") return emu::Space::device;
  if (name == "host") return emu::Space::host;
  if (name == "remote") return emu::Space::remote;
  throw std::invalid_argument("space: got " + name + "; allowed: symmetric, device, host or remote");
}

std::unique_ptr<emu::Simulation> make_machine(int num_ranks, int max_blocks, int max_threads, int num_sms,
                                              int ranks_per_node, bool copy_engines, int max_open_puts,
                                              bool weak_signals, const std::string& strategy, uint64_t seed,
                                              uint64_t expected_steps, uint64_t max_steps,
                                              std::vector<emu::Fault> faults) {
  if (num_ranks < 1 || max_blocks < 1 || max_threads < 32 || max_threads % 32 != 0 || num_sms < 0 ||
      ranks_per_node < 0 || max_open_puts < 0)
    throw std::invalid_argument("a machine has ranks, blocks, and whole warps of threads");
  const int num_actors = copy_engines ? 2 * num_ranks : num_ranks;
  for (const emu::Fault& fault : faults)
    if (fault.rank < 0 || fault.rank >= num_actors) throw std::invalid_argument("fault: no such rank");
  const emu::Shape shape{.num_ranks = num_actors,
                         .max_blocks = max_blocks,
                         .max_threads = max_threads,
                         .num_sms = num_sms,
                         .ranks_per_node = ranks_per_node,
                         .num_gpus = num_ranks,
                         .max_open_puts = max_open_puts,
                         .weak_signals = weak_signals};
  const emu::Plan plan{.strategy = strategy_named(strategy),
                       .seed = seed,
                       .expected_steps = expected_steps,
                       .max_steps = max_steps,
                       .faults = std::move(faults)};
  return std::make_unique<emu::Simulation>(shape, plan);
}

const char* status_name(emu::Outcome::Status status) {
  switch (status) {
    case emu::Outcome::Status::done: return "done";
    case emu::Outcome::Status::host: return "host";
    case emu::Outcome::Status::watched: return "watched";
    case emu::Outcome::Status::failed: return "failed";
  }
  return "?";
}

/// A kernel's arguments as `Machine.launch` takes them.
template <class Args>
py::bytes bytes_of(const Args& args) {
  return py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
}

/// See bindings/rows.hpp.
struct RowBytes {
  static py::bytes sort_pairs(const dk::SortPairsArgs& args, void*) { return bytes_of(args); }
  static py::bytes select_topk(const dk::SelectTopkArgs& args, void*) { return bytes_of(args); }
  static py::bytes count_entries(const dk::CountEntriesArgs& args, void*) { return bytes_of(args); }
  static py::bytes spread_rows(const dk::SpreadRowsArgs& args, void*) { return bytes_of(args); }
  static py::bytes cast_rows(const dk::CastRowsArgs& args, void*) { return bytes_of(args); }
  static py::bytes reduce_rows(const dk::ReduceRowsArgs& args, void*) { return bytes_of(args); }
  static py::bytes weigh_rows(const dk::WeighRowsArgs& args, void*) { return bytes_of(args); }
  static py::bytes swiglu(const dk::SwigluArgs& args, void*) { return bytes_of(args); }
  static py::bytes swiglu_backward(const dk::SwigluArgs& args, void*) { return bytes_of(args); }
};

void bind_kernels(py::module_& m) {
  py::class_<Kernels>(m, "Kernels").def_property_readonly("names", [](const Kernels& kernels) {
    std::vector<std::string> names;
    for (size_t i = 0; i < kernels.set->count; ++i) names.emplace_back(kernels.set->kernels[i].name);
    return names;
  });
  m.def("load_kernels", &load_kernels, "path"_a);
  m.def("own_kernels", [] { return Kernels{deepep_emulator_kernels()}; });
}

void bind_machine(py::module_& m) {
  py::class_<emu::Outcome>(m, "Outcome")
      .def_property_readonly("status", [](const emu::Outcome& o) { return status_name(o.status); })
      .def_readonly("rank", &emu::Outcome::rank)
      .def_readonly("in_time", &emu::Outcome::in_time)
      .def_readonly("words", &emu::Outcome::words)
      .def_readonly("kind", &emu::Outcome::kind)
      .def_readonly("text", &emu::Outcome::text)
      .def_readonly("steps", &emu::Outcome::steps)
      .def_readonly("switches", &emu::Outcome::switches)
      .def_readonly("now_ns", &emu::Outcome::now_ns);

  py::class_<emu::Fault>(m, "MachineFault")
      .def(py::init([](int rank, uint64_t at, bool counts_writes, uint64_t pause_ns, bool loses_writes) {
             return emu::Fault{.rank = rank,
                               .at = at,
                               .counts_writes = counts_writes,
                               .pause_ns = pause_ns,
                               .loses_writes = loses_writes};
           }),
           py::kw_only(), "rank"_a, "at"_a, "counts_writes"_a = false, "pause_ns"_a = 0,
           "loses_writes"_a = false);

  py::class_<emu::Simulation>(m, "Machine")
      .def(py::init(&make_machine), py::kw_only(), "num_ranks"_a, "max_blocks"_a, "max_threads"_a,
           "num_sms"_a = 0, "ranks_per_node"_a = 0, "copy_engines"_a = false, "max_open_puts"_a = 0,
           "weak_signals"_a = false,
           "strategy"_a = "random",
           "seed"_a = 0, "expected_steps"_a = 20000, "max_steps"_a = 20'000'000,
           "faults"_a = std::vector<emu::Fault>{})
      .def(
          "allocate",
          [](emu::Simulation& machine, std::string name, const std::string& space, int rank, size_t bytes) {
            return machine.allocate(std::move(name), space_named(space), rank, bytes);
          },
          "name"_a, "space"_a, "rank"_a, "bytes"_a)
      .def(
          "allocate_zeros",
          [](emu::Simulation& machine, std::string name, const std::string& space, int rank, size_t bytes) {
            return machine.allocate_zeros(std::move(name), space_named(space), rank, bytes);
          },
          "name"_a, "space"_a, "rank"_a, "bytes"_a)
      .def(
          "write",
          [](emu::Simulation& machine, int rank, uintptr_t address, const py::buffer& data) {
            const py::buffer_info info = data.request();
            machine.host_write(rank, address, info.ptr, static_cast<size_t>(info.size * info.itemsize));
          },
          "rank"_a, "address"_a, "data"_a)
      .def(
          "read",
          [](emu::Simulation& machine, int rank, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.host_read(rank, address, bytes.data(), count);
            return py::bytes(bytes);
          },
          "rank"_a, "address"_a, "count"_a)
      .def("forget", &emu::Simulation::host_forget, "rank"_a, "address"_a, "count"_a)
      .def(
          "watch",
          [](emu::Simulation& machine, int rank, uintptr_t address, uint32_t value, uint64_t timeout_ns,
             bool until_idle) {
            machine.watch(rank, {.address = address,
                                 .bytes = 4,
                                 .count = 1,
                                 .condition = {emu::Condition::Kind::equal, value},
                                 .timeout_ns = timeout_ns,
                                 .until_idle = until_idle});
          },
          "rank"_a, "address"_a, "value"_a, "timeout_ns"_a, "until_idle"_a)
      .def(
          "watch_tags",
          [](emu::Simulation& machine, int rank, uintptr_t address, int count, uint32_t tag,
             uint64_t timeout_ns) {
            machine.watch(rank, {.address = address,
                                 .bytes = 8,
                                 .count = count,
                                 .condition = {emu::Condition::Kind::tag, tag},
                                 .timeout_ns = timeout_ns});
          },
          "rank"_a, "address"_a, "count"_a, "tag"_a, "timeout_ns"_a)
      .def(
          "watcher_read",
          [](emu::Simulation& machine, int rank, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.watcher_read(rank, address, bytes.data(), count);
            return py::bytes(bytes);
          },
          "rank"_a, "address"_a, "count"_a)
      .def(
          "peek",
          [](const emu::Simulation& machine, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.peek(address, bytes.data(), count);
            return py::bytes(bytes);
          },
          "address"_a, "count"_a)
      .def(
          "launch",
          [](emu::Simulation& machine, int rank, const std::string& kernel, const py::bytes& args,
             int num_blocks, int num_threads, int64_t shared_bytes, const Kernels& kernels) {
            const std::string_view bytes = args;
            machine.launch(rank, *kernels.set, kernel, bytes.data(), bytes.size(), num_blocks, num_threads,
                           shared_bytes);
          },
          "rank"_a, "kernel"_a, "args"_a, "num_blocks"_a, "num_threads"_a, "shared_bytes"_a, "kernels"_a)
      .def("meet", &emu::Simulation::meet)
      .def("put_bytes", &emu::Simulation::put_bytes, "rank"_a, "to"_a)
      .def("host_step", &emu::Simulation::host_step, "rank"_a)
      .def("run", &emu::Simulation::run, py::call_guard<py::gil_scoped_release>());
}

void bind_domain(py::module_& m) {
  deepep::bindings::bind_common(m);
  m.attr("EPOCHS") =
      offsetof(dk::LocalState, blocks_started) / sizeof(uint32_t);  // the first words of the state
  m.attr("TOO_MANY_ROWS") = static_cast<uint32_t>(dk::Phase::kTooManyRows);
  m.attr("DISAGREEMENT") = static_cast<uint32_t>(dk::Phase::kDisagreement);
  m.attr("HOST_COUNTS_WORDS") = offsetof(dk::HostCounts, lists) / sizeof(uint64_t);

  py::class_<Domain> domain(m, "Domain");
  domain.def(py::init([](emu::Simulation& machine, const Kernels& kernels, int num_threads, int rank,
                         const std::vector<uintptr_t>& heaps, int max_local_experts, int max_blocks,
                         int64_t staging_bytes, uintptr_t state, uintptr_t fault, uintptr_t counting,
                         double timeout_seconds) {
               return std::make_unique<Domain>(
                   deepep::bindings::domain_options(rank, heaps, max_local_experts, max_blocks, staging_bytes,
                                                    state, fault, counting, timeout_seconds),
                   machine, *kernels.set, rank, num_threads);
             }),
             py::keep_alive<1, 2>(), py::kw_only(), "machine"_a, "kernels"_a, "num_threads"_a, "rank"_a,
             "heaps"_a, "max_local_experts"_a, "max_blocks"_a, "staging_bytes"_a, "state"_a, "fault"_a,
             "counting"_a = 0, "timeout_seconds"_a);
  deepep::bindings::bind_operations(domain);
  deepep::bindings::bind_lines(domain);
  domain
      .def_property_readonly(
          "fault_word",
          [](const Domain& self) { return reinterpret_cast<uintptr_t>(&self.group().fault->pending); },
          "Where the host watches for a fault: the word becomes 1 when there is one.")
      .def(
          "watched_fault", [](Domain& self) { return self.launcher().watched_fault(self.group()); },
          "The fault record while a kernel runs, which stays; or None.")
      .def(
          "ce_doorbell_rung", [](Domain& self) { return self.launcher().ce_doorbell_rung(self.group()); },
          "Whether the copy engine's doorbell was rung for all that it was ordered; the rank's stream is "
          "idle.");
}

void bind_layouts(py::module_& m) {
  m.def(
      "epoch_words",
      [](int num_ranks, int max_local_experts, int max_blocks) {
        const layout::ControlLayout control{num_ranks, max_local_experts, max_blocks};
        std::vector<int64_t> offsets;
        for (int r = 0; r < num_ranks; ++r)
          offsets.insert(offsets.end(), {control.staging_free(r), control.arrived(r)});
        return offsets;
      },
      "num_ranks"_a, "max_local_experts"_a, "max_blocks"_a, "Offsets of the words that only grow.");
  m.def(
      "staging_rows_begin",
      [](int64_t area_bytes, int64_t row_bytes, int num_topk) {
        return layout::StagingLayout{area_bytes, row_bytes, num_topk}.rows_begin();
      },
      "area_bytes"_a, "row_bytes"_a, "num_topk"_a);
  using layout::SlotLayout;
  py::class_<SlotLayout>(m, "SlotLayout")
      .def(py::init([](int64_t capacity, int64_t row_bytes, int num_scales, int num_topk, int index_bytes) {
             return SlotLayout{.capacity = capacity,
                               .row_bytes = row_bytes,
                               .num_scales = num_scales,
                               .num_topk = num_topk,
                               .index_bytes = index_bytes};
           }),
           py::kw_only(), "capacity"_a, "row_bytes"_a, "num_scales"_a, "num_topk"_a, "index_bytes"_a)
      .def_property_readonly("source", &SlotLayout::source)
      .def_property_readonly("scales", &SlotLayout::scales)
      .def_property_readonly("topk_idx", &SlotLayout::topk_idx)
      .def_property_readonly("topk_weights", &SlotLayout::topk_weights)
      .def_property_readonly("num_bytes", &SlotLayout::bytes);
}

void bind_kernel_arguments(py::module_& m) {
  m.def(
      "litmus_args",
      [](int role, int writer, int reader, uintptr_t words, uintptr_t out, uint64_t timeout_ns, uintptr_t links,
         uintptr_t neighbour, uintptr_t far) {
        return bytes_of(deepep::litmus::LitmusArgs{.role = role,
                                                   .writer = writer,
                                                   .reader = reader,
                                                   .words = pointer<uint32_t>(words),
                                                   .out = pointer<uint32_t>(out),
                                                   .timeout_ns = timeout_ns,
                                                   .links = pointer<uint32_t>(links),
                                                   .neighbour = pointer<uint32_t>(neighbour),
                                                   .far = pointer<uint32_t>(far)});
      },
      py::kw_only(), "role"_a, "writer"_a, "reader"_a, "words"_a, "out"_a, "timeout_ns"_a, "links"_a = 0,
      "neighbour"_a = 0, "far"_a = 0);
  m.def(
      "bulk_copy_args",
      [](uintptr_t from, uintptr_t to, int64_t bytes, int64_t stage_bytes, int num_stages,
         uint64_t timeout_ns) {
        return bytes_of(dk::BulkCopyArgs{.from = pointer<const std::byte>(from),
                                         .to = pointer<std::byte>(to),
                                         .bytes = bytes,
                                         .stage_bytes = stage_bytes,
                                         .num_stages = num_stages,
                                         .timeout_ns = timeout_ns});
      },
      py::kw_only(), "source"_a, "target"_a, "num_bytes"_a, "stage_bytes"_a, "num_stages"_a, "timeout_ns"_a);
  m.def(
      "bulk_copy_shared_bytes",
      [](int num_warps, int num_stages, int64_t stage_bytes) {
        return dk::BulkCopyShared{num_warps, num_stages, stage_bytes}.bytes();
      },
      "num_warps"_a, "num_stages"_a, "stage_bytes"_a);
  m.def(
      "copy_args",
      [](uintptr_t from, uintptr_t to, int64_t bytes) {
        return bytes_of(dk::CopyArgs{pointer<const std::byte>(from), pointer<std::byte>(to), bytes});
      },
      "source"_a, "target"_a, "num_bytes"_a);
  deepep::bindings::bind_exchange(m, [] {}).def(
      "args",
      [](const deepep::bindings::ExchangeOf& self, uintptr_t source, const std::vector<int64_t>& sent,
         const std::vector<int64_t>& received, uintptr_t sums, int num_blocks) {
        return bytes_of(self.call(source, sent, received, sums, num_blocks));
      },
      py::kw_only(), "source"_a, "sent"_a, "received"_a, "sums"_a, "num_blocks"_a,
      "Of a launch of exchange_kernel, or, with sums, exchange_read_kernel.");
  deepep::bindings::bind_all_reduce(m, [] {}).def(
      "args",
      [](const deepep::bindings::AllReduceOf& self, uintptr_t tensor, int64_t count, bool is_bf16,
         bool is_oneshot, const std::string& format, bool is_fixed, float divisor,
         const std::vector<uint32_t>& keys, uint64_t first_index, int num_blocks) {
        return bytes_of(self.call(tensor, count, is_bf16, is_oneshot, format, is_fixed, divisor, keys,
                                  first_index, num_blocks));
      },
      py::kw_only(), "tensor"_a, "count"_a, "is_bf16"_a, "is_oneshot"_a, "format"_a, "is_fixed"_a, "divisor"_a,
      "keys"_a, "first_index"_a, "num_blocks"_a,
      "Of a launch of all_reduce_oneshot_kernel, or all_reduce_direct_kernel.");
  m.def(
      "exchange_rows",
      [](int num_ranks, int64_t pair_bytes, uint32_t epoch, int source) {
        return layout::ExchangeSlots{num_ranks, pair_bytes}.rows(epoch, source);
      },
      "num_ranks"_a, "pair_bytes"_a, "epoch"_a, "source"_a, "Where a source's rows lie in symmetric memory.");
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The kernels' own source over an emulated machine: seeded schedules, a checked memory model.";

  static py::exception<emu::HostFailure> host_failure(m, "HostFailure");
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const emu::HostFailure& failure) {
      PyErr_SetString(host_failure.ptr(), (failure.kind + "\n" + failure.text).c_str());
    }
  });

  bind_kernels(m);
  bind_machine(m);
  bind_domain(m);
  deepep::bindings::bind_emulated_low_latency<Kernels>(m);
  deepep::bindings::bind_emulated_two_level<Kernels>(m);
  bind_layouts(m);
  bind_kernel_arguments(m);
  deepep::bindings::bind_rows<RowBytes>(m, "_args");
}
