// deepep._emulator: the emulated machine for Python. Addresses and bytes; no torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "emulator/domain.hpp"
#include "emulator/litmus/litmus.hpp"
#include "emulator/run/simulation.hpp"
#include "kernels/copy/bulk_copy.hpp"
#include "kernels/copy/copy.hpp"

namespace py = pybind11;
namespace emu = deepep::emu;

extern "C" const emu::KernelSet* deepep_emulator_kernels();

namespace {

emu::Kernels load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  auto* entry = reinterpret_cast<const emu::KernelSet* (*)()>(dlsym(library, "deepep_emulator_kernels"));
  if (entry == nullptr) throw std::runtime_error(path + " holds no kernels for the emulator");
  return {entry()};
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
  throw std::invalid_argument("space: got " + name + "; allowed: symmetric, device or host");
}

/// (rank, step or number of writes, whether it is the latter, pause in ns or 0 for good, whether unseen writes are lost)
using FaultTuple = std::tuple<int, uint64_t, bool, uint64_t, bool>;

std::unique_ptr<emu::Simulation> make_machine(int num_ranks, int max_blocks, int max_threads, int num_sms,
                                              int ranks_per_node, bool copy_engines, const std::string& strategy,
                                              uint64_t seed, uint64_t expected_steps,
                                              uint64_t max_steps, const std::vector<FaultTuple>& faults) {
  if (num_ranks < 1 || max_blocks < 1 || max_threads < 32 || max_threads % 32 != 0 || num_sms < 0 ||
      ranks_per_node < 0)
    throw std::invalid_argument("a machine has ranks, blocks, and whole warps of threads");
  const int num_actors = copy_engines ? 2 * num_ranks : num_ranks;
  emu::Plan plan{strategy_named(strategy), seed, expected_steps, max_steps, {}};
  for (const auto& [rank, step, counts_writes, pause, loses] : faults) {
    if (rank < 0 || rank >= num_actors) throw std::invalid_argument("fault: no such rank");
    plan.faults.push_back({rank, step, counts_writes, pause, loses});
  }
  return std::make_unique<emu::Simulation>(
      emu::Shape{num_actors, max_blocks, max_threads, num_sms, ranks_per_node, num_ranks}, plan);
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

  py::class_<emu::Kernels>(m, "Kernels").def_property_readonly("names", [](const emu::Kernels& kernels) {
    std::vector<std::string> names;
    for (size_t i = 0; i < kernels.set->count; ++i) names.emplace_back(kernels.set->kernels[i].name);
    return names;
  });
  m.def("load_kernels", &load_kernels, py::arg("path"));
  m.def("own_kernels", [] { return emu::Kernels{deepep_emulator_kernels()}; });

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

  py::class_<emu::Simulation>(m, "Machine")
      .def(py::init(&make_machine), py::kw_only(), py::arg("num_ranks"), py::arg("max_blocks"), py::arg("max_threads"),
           py::arg("num_sms") = 0, py::arg("ranks_per_node") = 0, py::arg("copy_engines") = false,
           py::arg("strategy") = "random", py::arg("seed") = 0,
           py::arg("expected_steps") = 20000, py::arg("max_steps") = 20'000'000,
           py::arg("faults") = std::vector<FaultTuple>{})
      .def(
          "allocate",
          [](emu::Simulation& machine, std::string name, const std::string& space, int rank, size_t bytes) {
            return machine.allocate(std::move(name), space_named(space), rank, bytes);
          },
          py::arg("name"), py::arg("space"), py::arg("rank"), py::arg("bytes"))
      .def(
          "write",
          [](emu::Simulation& machine, int rank, uintptr_t address, const py::buffer& data) {
            const py::buffer_info info = data.request();
            machine.host_write(rank, address, info.ptr, static_cast<size_t>(info.size * info.itemsize));
          },
          py::arg("rank"), py::arg("address"), py::arg("data"))
      .def(
          "read",
          [](emu::Simulation& machine, int rank, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.host_read(rank, address, bytes.data(), count);
            return py::bytes(bytes);
          },
          py::arg("rank"), py::arg("address"), py::arg("count"))
      .def("forget", &emu::Simulation::host_forget, py::arg("rank"), py::arg("address"), py::arg("count"))
      .def(
          "watch",
          [](emu::Simulation& machine, int rank, uintptr_t address, uint32_t value, uint64_t timeout_ns,
             bool until_idle) {
            machine.watch(rank, {address, 4, 1, {emu::Condition::Kind::equal, value}, timeout_ns, until_idle});
          },
          py::arg("rank"), py::arg("address"), py::arg("value"), py::arg("timeout_ns"), py::arg("until_idle"))
      .def(
          "watch_tags",
          [](emu::Simulation& machine, int rank, uintptr_t address, int count, uint32_t tag, uint64_t timeout_ns) {
            machine.watch(rank, {address, 8, count, {emu::Condition::Kind::tag, tag}, timeout_ns, false});
          },
          py::arg("rank"), py::arg("address"), py::arg("count"), py::arg("tag"), py::arg("timeout_ns"))
      .def(
          "watcher_read",
          [](emu::Simulation& machine, int rank, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.watcher_read(rank, address, bytes.data(), count);
            return py::bytes(bytes);
          },
          py::arg("rank"), py::arg("address"), py::arg("count"))
      .def(
          "peek",
          [](const emu::Simulation& machine, uintptr_t address, size_t count) {
            std::string bytes(count, '\0');
            machine.peek(address, bytes.data(), count);
            return py::bytes(bytes);
          },
          py::arg("address"), py::arg("count"))
      .def(
          "launch",
          [](emu::Simulation& machine, int rank, const std::string& kernel, const py::bytes& args, int num_blocks,
             int num_threads, int64_t shared_bytes, const emu::Kernels& kernels) {
            const std::string_view bytes = args;
            machine.launch(rank, *kernels.set, kernel, bytes.data(), bytes.size(), num_blocks, num_threads,
                           shared_bytes);
          },
          py::arg("rank"), py::arg("kernel"), py::arg("args"), py::arg("num_blocks"), py::arg("num_threads"),
          py::arg("shared_bytes"), py::arg("kernels"))
      .def("meet", &emu::Simulation::meet)
      .def("host_step", &emu::Simulation::host_step, py::arg("rank"))
      .def("run", &emu::Simulation::run, py::call_guard<py::gil_scoped_release>());

  m.def(
      "litmus_args",
      [](int role, int writer, int reader, uintptr_t words, uintptr_t out, uint64_t timeout_ns, uintptr_t neighbour) {
        const deepep::litmus::LitmusArgs args{role,
                                              writer,
                                              reader,
                                              reinterpret_cast<uint32_t*>(words),
                                              reinterpret_cast<uint32_t*>(out),
                                              timeout_ns,
                                              reinterpret_cast<uint32_t*>(neighbour)};
        return py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
      },
      py::arg("role"), py::arg("writer"), py::arg("reader"), py::arg("words"), py::arg("out"), py::arg("timeout_ns"),
      py::arg("neighbour") = 0);
  m.def(
      "bulk_copy_args",
      [](uintptr_t from, uintptr_t to, int64_t bytes, int64_t stage_bytes, int num_stages, uint64_t timeout_ns) {
        const deepep::kernels::BulkCopyArgs args{reinterpret_cast<const std::byte*>(from),
                                                 reinterpret_cast<std::byte*>(to),
                                                 bytes,
                                                 stage_bytes,
                                                 num_stages,
                                                 timeout_ns};
        return py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
      },
      py::arg("source"), py::arg("target"), py::arg("num_bytes"), py::arg("stage_bytes"), py::arg("num_stages"),
      py::arg("timeout_ns"));
  m.def("bulk_copy_shared_bytes", [](int num_warps, int num_stages, int64_t stage_bytes) {
    return deepep::kernels::BulkCopyShared{num_warps, num_stages, stage_bytes}.bytes();
  });
  m.def("copy_args", [](uintptr_t from, uintptr_t to, int64_t bytes) {
    const deepep::kernels::CopyArgs args{reinterpret_cast<const std::byte*>(from), reinterpret_cast<std::byte*>(to),
                                         bytes};
    return py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
  });
  emu::bind_domain(m);
}
