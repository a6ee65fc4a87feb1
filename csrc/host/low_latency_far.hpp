// Low-latency calls between domains: who is far from whom, and a launcher that adds that to a domain's calls.
// What checks a call and shares out its work is LowLatencyDomain, as inside a domain.
#pragma once

#include <bit>
#include <utility>
#include <vector>

#include "host/low_latency.hpp"
#include "kernels/low_latency_rails/args.hpp"

namespace deepep::host {

/// Ranks in domains, and the largest call that their memory has room for: what all ranks share.
struct FarShape {
  layout::Placement place;
  int max_local_experts = 0;
  int max_tokens = 0;
  int max_topk = 0;
  int64_t max_row_bytes = 0;  // of bf16
  int entry_stretches = 0;    // LowLatencySlots: of rows that go back for each entry
  bool has_gateways = false;  // two levels: a rank puts to one rank of each other domain; all are of one size

  /// The most ranks that a rank puts to.
  [[nodiscard]] int max_far() const {
    return has_gateways ? place.num_domains() - 1 : layout::max_far_ranks(place);
  }
  [[nodiscard]] bool is_regular() const { return place.num_ranks % place.ranks_per_domain == 0; }
  [[nodiscard]] layout::LowLatencyFarSlots slots() const {
    return layout::LowLatencyFarSlots(max_far(), max_local_experts, max_tokens, max_topk, max_row_bytes,
                                      entry_stretches > 0 ? max_topk : 1,
                                      has_gateways ? place.ranks_per_domain : 1);
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
    if (shape.has_gateways) {
      if ((r - rank) % place.ranks_per_domain != 0) continue;
      const int own = place.domain_of_rank(rank), its = place.domain_of_rank(r);
      far.bits |= 1u << r;
      far.number[r] = its < own ? its : its - 1;
      far.there[r] = own < its ? own : own - 1;
      continue;
    }
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
        has_gateways_(shape.has_gateways),
        domain_{.first = shape.place.first_rank_of_domain(shape.place.domain_of_rank(rank)),
                .num_ranks = shape.place.ranks_per_domain,
                .by_ranks = layout::Divisor(shape.place.ranks_per_domain)},
        words_bytes_(16 + 8 * shape.place.num_ranks * ((shape.max_tokens + 31) / 32) + 32),
        launcher_(std::forward<OfLauncher>(of_launcher)...) {
    if (has_gateways_ && !shape.is_regular())
      throw std::invalid_argument("low latency in two levels: all domains are of one size");
    if (has_gateways_ && shape.entry_stretches > 0)
      throw std::invalid_argument("low latency in two levels: sums go back");
  }

  [[nodiscard]] kernels::BlockSize block_size() const {
    kernels::BlockSize size = launcher_.block_size();
    size.bulk_bytes = layout::max_of(size.bulk_bytes - words_bytes_, 0);
    return size;
  }

  void start(const kernels::LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream) {
    const kernels::FarDispatchArgs far{args, far_};
    if (!has_gateways_) return launcher_.start(far, num_blocks, halves, stream);
    if (halves != Halves::kBoth) throw std::invalid_argument("low latency in two levels: no halves");
    launcher_.start(kernels::RailDispatchArgs{far, domain_}, num_blocks, halves, stream);
  }
  void start(const kernels::LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream) {
    const kernels::FarCombineArgs far{args, far_};
    if (!has_gateways_) return launcher_.start(far, num_blocks, halves, stream);
    if (halves != Halves::kBoth) throw std::invalid_argument("low latency in two levels: no halves");
    if (args.returned != kernels::Returned::kSums)
      throw std::invalid_argument("low latency in two levels: sums go back, as they are");
    launcher_.start(kernels::RailCombineArgs{far, domain_}, num_blocks, halves, stream);
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
  bool has_gateways_;
  kernels::RailDomain domain_;
  int words_bytes_;
  L launcher_;
};

}  // namespace deepep::host
