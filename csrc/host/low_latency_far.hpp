// Low-latency calls between domains: who is far from whom, and a launcher that adds that to a domain's calls.
// What checks a call and shares out its work is LowLatencyDomain, as inside a domain.
#pragma once

#include <bit>
#include <utility>
#include <vector>

#include "host/low_latency.hpp"
#include "kernels/low_latency_far/args.hpp"

namespace deepep::host {

/// Ranks in domains, and the largest call that their memory has room for: what all ranks share.
struct FarShape {
  layout::Placement place;
  int max_local_experts = 0;
  int max_tokens = 0;
  int max_topk = 0;
  int64_t max_row_bytes = 0;  // of bf16

  [[nodiscard]] int max_far() const { return layout::max_far_ranks(place); }
  [[nodiscard]] layout::LowLatencyFarSlots slots() const {
    return layout::LowLatencyFarSlots(max_far(), max_local_experts, max_tokens, max_topk, max_row_bytes);
  }
  /// Places in a rank's queue of puts, a power of two: for all that may be open.
  [[nodiscard]] int64_t num_put_orders() const {
    return static_cast<int64_t>(
        std::bit_ceil(static_cast<uint64_t>(max_far() * layout::LowLatencyFarSlots::max_open_puts())));
  }
  /// The words that puts raise, as they are after so many calls of either kind: offset and value.
  [[nodiscard]] std::vector<std::pair<int64_t, uint64_t>> signals(uint64_t before) const {
    const layout::LowLatencyFarSlots lies = slots();
    std::vector<std::pair<int64_t, uint64_t>> words;
    for (int far = 0; far < max_far(); ++far)
      for (int kind = 0; kind < layout::kFarPuts; ++kind)
        for (int64_t half = 0; half < 2; ++half)
          words.emplace_back(lies.signal(static_cast<layout::FarPut>(kind), far, half),
                             (before + 1 - static_cast<uint64_t>(half)) / 2);
    return words;
  }
};

/// A rank's memory that its NIC knows, its words about it, and what it puts by.
struct FarMemory {
  std::byte* remote = nullptr;
  kernels::FarState* state = nullptr;
  dev::Wire wire;
};

/// The far ranks of `rank`, as its kernels are given them.
[[nodiscard]] inline kernels::FarRanks far_ranks_of(const FarShape& shape, int rank, const FarMemory& memory) {
  const layout::Placement& place = shape.place;
  // Of `to` among the ranks that are far from `from`: those of its domain are left out.
  const auto number = [&](int from, int to) {
    const int domain = place.domain_of_rank(from);
    return to < place.first_rank_of_domain(domain) ? to : to - place.num_ranks_of_domain(domain);
  };
  kernels::FarRanks far{
      .slots = shape.slots(), .remote = memory.remote, .wire = memory.wire, .state = memory.state};
  for (int r = 0; r < place.num_ranks; ++r) {
    if (place.domain_of_rank(r) == place.domain_of_rank(rank)) continue;
    far.bits |= 1u << r;
    far.number[r] = number(rank, r);
    far.there[r] = number(r, rank);
  }
  return far;
}

/// The launcher of a rank whose calls go to other domains as well. L: launches the kernels, of FarDispatchArgs
/// and FarCombineArgs.
template <class L>
class FarLauncher {
 public:
  template <class... OfLauncher>
  FarLauncher(const FarShape& shape, int rank, const FarMemory& memory, OfLauncher&&... of_launcher)
      : far_(far_ranks_of(shape, rank, memory)),
        words_bytes_(16 + 4 * shape.place.num_ranks * ((shape.max_tokens + 31) / 32) + 16),
        launcher_(std::forward<OfLauncher>(of_launcher)...) {}

  [[nodiscard]] kernels::BlockSize block_size() const {
    kernels::BlockSize size = launcher_.block_size();
    size.bulk_bytes = layout::max_of(size.bulk_bytes - words_bytes_, 0);
    return size;
  }

  void start(const kernels::LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream) {
    launcher_.start(kernels::FarDispatchArgs{args, far_}, num_blocks, halves, stream);
  }
  void start(const kernels::LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream) {
    if (args.returned != kernels::Returned::kSums)
      throw std::invalid_argument("low_latency_combine: between domains sums go back, as they are");
    launcher_.start(kernels::FarCombineArgs{args, far_}, num_blocks, halves, stream);
  }

  // What a GPU's domain asks its launcher for, where L has it.
  [[nodiscard]] auto take_fault(const kernels::Group& group, void* stream) {
    return launcher_.take_fault(group, stream);
  }
  [[nodiscard]] auto& turns() { return launcher_.turns(); }
  [[nodiscard]] bool was_captured() const { return launcher_.was_captured(); }

  [[nodiscard]] L& within() { return launcher_; }

 private:
  kernels::FarRanks far_;
  int words_bytes_;
  L launcher_;
};

}  // namespace deepep::host
