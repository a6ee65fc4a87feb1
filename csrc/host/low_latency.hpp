// One rank's view of the low-latency operations: the same for CUDA and for the emulator. Low latency has
// memory, state and a fault record of its own, so nothing here depends on the throughput operations.
//
// A LowLatencyDomain turns a call into what a kernel is given; its launcher launches it. All memory is the
// caller's to keep alive.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels/low_latency/share.hpp"

namespace deepep::host {

using kernels::Halves;

// Of `args`, the domain fills in the group and the slots. `stream` is a cudaStream_t; null on the emulator.

struct LowLatencyDispatchCall {
  int num_blocks = 1;
  int halves = 0;
  kernels::LowLatencyDispatchArgs args{};
  void* stream = nullptr;
};

struct LowLatencyCombineCall {
  int num_blocks = 1;
  int halves = 0;
  kernels::LowLatencyCombineArgs args{};
  void* stream = nullptr;
};

/// A rank, the ranks it reaches, the memory that both operations use, and the largest call that it has room
/// for.
struct LowLatencyOptions {
  int rank = 0;
  std::vector<std::byte*> heaps;  // every rank's, as mapped here: LowLatencySlots; control_bytes() of it zero
  int max_local_experts = 0;
  int max_tokens = 0;
  int max_topk = 0;
  int64_t max_row_bytes = 0;  // of bf16
  int entry_stretches = 0;    // LowLatencySlots: of rows that go back for each entry
  kernels::LocalState* state = nullptr;
  kernels::FaultRecord* fault = nullptr;
  double timeout_seconds = 0;
  bool shrinks = false;  // kernels mask a rank that is missing, and go on
};

[[nodiscard]] inline layout::LowLatencySlots low_latency_slots(const LowLatencyOptions& given) {
  return layout::LowLatencySlots(static_cast<int>(given.heaps.size()), given.max_local_experts,
                                 given.max_tokens, given.max_topk, given.max_row_bytes,
                                 given.entry_stretches);
}

/// Of a recorded launch.
[[nodiscard]] constexpr const char* name_of(const kernels::LowLatencyDispatchArgs&) {
  return "low_latency_dispatch";
}
[[nodiscard]] constexpr const char* name_of(const kernels::LowLatencyCombineArgs&) {
  return "low_latency_combine";
}

template <class L>
class LowLatencyDomain {
 public:
  template <class... OfLauncher>
  explicit LowLatencyDomain(const LowLatencyOptions& given, OfLauncher&&... of_launcher)
      : options_(given), slots_(low_latency_slots(given)), launcher_(std::forward<OfLauncher>(of_launcher)...) {
    const size_t num_ranks = given.heaps.size();
    if (num_ranks == 0 || num_ranks > layout::kMaxRanks)
      throw std::invalid_argument("an NVLink domain has 1 to 32 ranks");
    group_.rank = given.rank;
    group_.num_ranks = static_cast<int>(num_ranks);
    group_.live = 0xffffffffu >> (32 - num_ranks);
    group_.shrinks = given.shrinks;
    group_.timeout_ns = static_cast<uint64_t>(given.timeout_seconds * 1e9);
    for (size_t r = 0; r < num_ranks; ++r) group_.heap[r] = given.heaps[r];
    group_.state = given.state;
    group_.fault = given.fault;
  }

  /// Ranks that take part in the calls to come: bit r is rank r.
  void set_live(uint32_t live) { group_.live = live; }

  void dispatch(const LowLatencyDispatchCall& call) { start(call, "low_latency_dispatch"); }
  void combine(const LowLatencyCombineCall& call) {
    const auto& a = call.args;
    if (static_cast<int>(a.returned) < 0 || static_cast<int>(a.returned) > 3)
      throw std::invalid_argument("low_latency_combine: there are four ways for rows to go back");
    if (kernels::returns_entries(a) != (options_.entry_stretches > 0) && !a.refused)
      throw std::invalid_argument("low_latency_combine: a sum that the buffer was not made for");
    const bool in_logfmt =
        a.returned == kernels::Returned::kSumsInLogfmt || a.returned == kernels::Returned::kEntriesInLogfmt;
    if (in_logfmt && a.hidden % layout::kLogfmtGroup != 0)
      throw std::invalid_argument("low_latency_combine: LogFMT takes whole groups of 128 channels");
    start(call, "low_latency_combine");
  }

  [[nodiscard]] const kernels::Group& group() const { return group_; }
  [[nodiscard]] L& launcher() { return launcher_; }

 private:
  template <class Call>
  void start(const Call& call, const char* what) {
    const auto& a = call.args;
    const auto refuse = [&](const char* why) { throw std::invalid_argument(std::string(what) + ": " + why); };
    if (a.num_tokens < 0 || a.num_tokens > a.max_tokens || a.max_tokens > options_.max_tokens)
      refuse("more tokens than the buffer was made for");
    if (a.num_topk < 1 || a.num_topk > options_.max_topk || a.num_topk > layout::kMaxTopk)
      refuse("more top-k entries than the buffer was made for");
    if (a.num_local_experts < 1 || a.num_local_experts > options_.max_local_experts)
      refuse("more experts than the buffer was made for");
    if (a.hidden < 8 || a.hidden % 8 != 0 || int64_t{2} * a.hidden > options_.max_row_bytes)
      refuse("a hidden size that the buffer was not made for");
    if (call.halves < 0 || call.halves > 2) refuse("there are two halves");
    if (call.num_blocks < 1) refuse("a launch has blocks");
    auto args = call.args;
    args.group = group_;
    args.slots = slots_;
    args.share = kernels::share_of(args, call.num_blocks, launcher_.block_size());
    launcher_.start(args, call.num_blocks, static_cast<Halves>(call.halves), call.stream);
  }

  LowLatencyOptions options_;
  kernels::Group group_{};
  layout::LowLatencySlots slots_;
  L launcher_;
};

}  // namespace deepep::host
