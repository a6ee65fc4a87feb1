// The bare exchange's arguments from Python: the same for deepep._cuda and deepep._emulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/exchange/args.hpp"

namespace deepep::bindings {

namespace py = pybind11;

/// One rank's part in exchanges of up to `pair_bytes` between any two ranks.
struct ExchangeOf {
  kernels::ExchangeArgs args{};

  ExchangeOf(int rank, const std::vector<uintptr_t>& heaps, int64_t pair_bytes, uintptr_t state,
             double timeout_seconds) {
    if (heaps.empty() || heaps.size() > layout::kMaxRanks) refuse("1 to 32 ranks");
    args.rank = rank;
    args.num_ranks = static_cast<int>(heaps.size());
    args.timeout_ns = static_cast<uint64_t>(timeout_seconds * 1e9);
    args.slots = {args.num_ranks, pair_bytes};
    for (size_t r = 0; r < heaps.size(); ++r) args.heap[r] = reinterpret_cast<std::byte*>(heaps[r]);
    args.state = reinterpret_cast<kernels::ExchangeState*>(state);
  }

  /// sent, received: bytes to and from each rank; this rank's own are not looked at. sums: 0, or where the sum
  /// of each warp's words goes.
  [[nodiscard]] kernels::ExchangeArgs call(uintptr_t source, const std::vector<int64_t>& sent,
                                           const std::vector<int64_t>& received, uintptr_t sums,
                                           int num_blocks) const {
    kernels::ExchangeArgs given = args;
    given.source = reinterpret_cast<const std::byte*>(source);
    given.sums = reinterpret_cast<uint32_t*>(sums);
    fill(given.sent, sent);
    fill(given.received, received);
    if (num_blocks < 1 || num_blocks > layout::kMaxExchangeBlocks) refuse("1 to 256 blocks");
    return given;
  }

 private:
  [[noreturn]] static void refuse(const char* what) {
    throw std::invalid_argument(std::string("exchange: ") + what);
  }
  void fill(int32_t* vectors, const std::vector<int64_t>& bytes) const {
    if (bytes.size() != static_cast<size_t>(args.num_ranks)) refuse("a number of bytes for each rank");
    for (size_t r = 0; r < bytes.size(); ++r) {
      if (bytes[r] < 0 || bytes[r] % 16 != 0 || bytes[r] > args.slots.pair_bytes())
        refuse("bytes: a multiple of 16, and no more than a pair has room for");
      vectors[r] = static_cast<int32_t>(bytes[r] / 16);
    }
  }
};

/// The class, one in each module, which adds its own way to launch; and sizes. `load` is called before one is
/// made.
inline py::class_<ExchangeOf> bind_exchange(py::module_& m, void (*load)()) {
  using namespace py::literals;
  m.attr("EXCHANGE_STATE_WORDS") = sizeof(kernels::ExchangeState) / sizeof(uint32_t);
  m.attr("EXCHANGE_MISSING") = offsetof(kernels::ExchangeState, missing) / sizeof(uint32_t);
  m.def(
      "exchange_bytes",
      [](int num_ranks, int64_t pair_bytes) {
        return layout::ExchangeSlots{num_ranks, pair_bytes}.bytes();
      },
      "num_ranks"_a, "pair_bytes"_a, "The symmetric memory of each rank, zero before the first exchange.");
  py::class_<ExchangeOf> exchange(m, "Exchange", py::module_local());
  exchange.def(py::init([load](int rank, const std::vector<uintptr_t>& heaps, int64_t pair_bytes,
                               uintptr_t state, double timeout_seconds) {
                 load();
                 return ExchangeOf(rank, heaps, pair_bytes, state, timeout_seconds);
               }),
               py::kw_only(), "rank"_a, "heaps"_a, "pair_bytes"_a, "state"_a, "timeout_seconds"_a);
  exchange.def_property_readonly(
      "pair_bytes", [](const ExchangeOf& self) { return self.args.slots.pair_bytes(); },
      "Bytes from one rank's rows to the next one's in `source`.");
  return exchange;
}

}  // namespace deepep::bindings
