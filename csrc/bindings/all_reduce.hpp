// The arguments of all-reduces over symmetric memory from Python: the same for deepep._cuda and
// deepep._emulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/all_reduce/args.hpp"

namespace deepep::bindings {

namespace py = pybind11;

/// One rank's part in all-reduces in which a rank pushes up to `pair_bytes` to another in a round.
struct AllReduceOf {
  kernels::AllReduceArgs args{};

  AllReduceOf(int rank, const std::vector<uintptr_t>& heaps, int64_t pair_bytes, uintptr_t state,
              uintptr_t host_missing, double timeout_seconds) {
    if (heaps.empty() || heaps.size() > layout::kMaxRanks) refuse("1 to 32 ranks");
    args.rank = rank;
    args.num_ranks = static_cast<int>(heaps.size());
    args.timeout_ns = static_cast<uint64_t>(timeout_seconds * 1e9);
    args.slots = {args.num_ranks, pair_bytes};
    for (size_t r = 0; r < heaps.size(); ++r) args.heap[r] = reinterpret_cast<std::byte*>(heaps[r]);
    args.state = reinterpret_cast<kernels::AllReduceState*>(state);
    args.host_missing = reinterpret_cast<uint32_t*>(host_missing);
  }

  /// Bytes that a block of 128 elements takes in a message.
  [[nodiscard]] static int64_t block_bytes(const std::string& format, bool is_bf16) {
    const int64_t block = layout::kGradientBlock;
    switch (named(format)) {
      case kernels::ReduceFormat::kFp8: return block + 4;
      case kernels::ReduceFormat::kFp16: return 2 * block + 8;
      case kernels::ReduceFormat::kBf16: return 2 * block;
      default: return (is_bf16 ? 2 : 4) * block;
    }
  }

  /// keys: of this rank's addends, then of results; empty: to nearest. divisor: by which sums are divided.
  [[nodiscard]] kernels::AllReduceArgs call(uintptr_t tensor, int64_t count, bool is_bf16, bool is_oneshot,
                                            const std::string& format, bool is_fixed, float divisor,
                                            const std::vector<uint32_t>& keys, uint64_t first_index,
                                            int num_blocks) const {
    kernels::AllReduceArgs given = args;
    if (num_blocks < 1 || num_blocks > layout::kMaxReduceBlocks) refuse("1 to 256 blocks");
    if (!keys.empty() && keys.size() != 4) refuse("two keys of two words, or none");
    given.format = named(format);
    if (is_fixed && given.format != kernels::ReduceFormat::kPlain) refuse("fixed point sums plain messages");
    if (count < 0) refuse("a count of 0 or more");
    const int64_t blocks = layout::num_gradient_blocks(count);
    const int64_t pushed = is_oneshot ? blocks : layout::ceil_div(blocks, args.num_ranks);
    if (pushed * block_bytes(format, is_bf16) > args.slots.pair_bytes())
      refuse("no more elements than a pair has room for");
    given.tensor = reinterpret_cast<std::byte*>(tensor);
    given.count = count;
    given.is_bf16 = is_bf16;
    given.is_aligned = tensor % (is_bf16 ? 8 : 16) == 0;
    given.is_fixed = is_fixed;
    given.is_nearest = keys.empty();
    for (given.headroom = 0; (1 << given.headroom) < args.num_ranks;) ++given.headroom;
    given.divisor = divisor;
    given.first_index = static_cast<uint32_t>(first_index);
    if (!keys.empty()) {
      given.addend_key = {keys[0], keys[1]};
      given.result_key = {keys[2], keys[3]};
    }
    return given;
  }

 private:
  [[noreturn]] static void refuse(const char* what) {
    throw std::invalid_argument(std::string("all-reduce: ") + what);
  }
  [[nodiscard]] static kernels::ReduceFormat named(const std::string& format) {
    constexpr std::array kNames = {"plain", "fp8", "fp16", "bf16"};
    for (size_t i = 0; i < kNames.size(); ++i)
      if (format == kNames[i]) return static_cast<kernels::ReduceFormat>(i);
    refuse("a format of plain, fp8, fp16, bf16");
  }
};

/// The class, one in each module, which adds its own way to launch; and sizes. `load` is called before one is
/// made.
inline py::class_<AllReduceOf> bind_all_reduce(py::module_& m, void (*load)()) {
  using namespace py::literals;
  m.attr("ALL_REDUCE_STATE_WORDS") = sizeof(kernels::AllReduceState) / sizeof(uint32_t);
  m.attr("ALL_REDUCE_MISSING") = offsetof(kernels::AllReduceState, missing) / sizeof(uint32_t);
  m.def(
      "all_reduce_bytes",
      [](int num_ranks, int64_t pair_bytes) {
        return layout::AllReduceSlots{num_ranks, pair_bytes}.bytes();
      },
      "num_ranks"_a, "pair_bytes"_a, "The symmetric memory of each rank.");
  m.def(
      "all_reduce_control_bytes",
      [](int num_ranks) {
        return layout::AllReduceSlots{num_ranks, 0}.control_bytes();
      },
      "num_ranks"_a, "Bytes of flags at its beginning, zero before the first all-reduce.");
  m.def("all_reduce_block_bytes", &AllReduceOf::block_bytes, "format"_a, "is_bf16"_a,
        "Bytes that 128 elements take in a message.");
  py::class_<AllReduceOf> made(m, "AllReduce", py::module_local());
  made.def(py::init([load](int rank, const std::vector<uintptr_t>& heaps, int64_t pair_bytes, uintptr_t state,
                           uintptr_t host_missing, double timeout_seconds) {
             load();
             return AllReduceOf(rank, heaps, pair_bytes, state, host_missing, timeout_seconds);
           }),
           py::kw_only(), "rank"_a, "heaps"_a, "pair_bytes"_a, "state"_a, "host_missing"_a = 0,
           "timeout_seconds"_a);
  made.def_property_readonly("pair_bytes",
                             [](const AllReduceOf& self) { return self.args.slots.pair_bytes(); });
  return made;
}

}  // namespace deepep::bindings
