#include "emulator/run/scheduler.hpp"

#include <algorithm>
#include <bit>

namespace deepep::emu {

Scheduler::Scheduler(const Topology& topology, Strategy strategy, uint64_t seed, uint64_t expected_steps)
    : strategy_(strategy), dice_(seed) {
  const auto warps_per_block = static_cast<uint32_t>(topology.max_threads / 32);
  const auto warps_per_rank = warps_per_block * static_cast<uint32_t>(topology.max_blocks);
  const uint32_t warps = warps_per_rank * static_cast<uint32_t>(topology.num_ranks);
  const uint32_t group_sizes[] = {warps_per_rank, warps_per_block, 1};
  warps_per_group_ = group_sizes[dice_.below(3)];
  const uint32_t stays[] = {0, 500, 900, 990};
  stay_per_mille_ = stays[dice_.below(4)];
  const uint32_t late[][2] = {{0, 0}, {300, 16}, {500, 256}, {300, 4096}, {1000, 2048}};
  const uint32_t profile = dice_.below(5);
  late_per_mille_ = late[profile][0];
  lateness_ = late[profile][1];
  if (strategy == Strategy::starve) {
    victim_ = dice_.below(warps / warps_per_group_);
    victim_is_slow_link_ = dice_.chance(300);
  }
  if (strategy == Strategy::pct) {
    const uint32_t groups = warps / warps_per_group_;
    std::vector<int64_t> of_group(groups);
    for (uint32_t g = 0; g < groups; ++g) of_group[g] = g + 1;
    for (uint32_t g = groups; g > 1; --g) std::swap(of_group[g - 1], of_group[dice_.below(g)]);
    // The hosts' warps, behind the others, are as urgent as the first group.
    priority_.assign(warps + static_cast<uint32_t>(topology.num_ranks), of_group[0]);
    for (uint32_t w = 0; w < warps; ++w) priority_[w] = of_group[group_of(w)];
    const uint32_t num_changes = dice_.below(6);
    for (uint32_t i = 0; i < num_changes; ++i) changes_.push_back(below(expected_steps + 1));
    std::sort(changes_.begin(), changes_.end());
  }
}

size_t Scheduler::pick(const std::vector<uint32_t>& ready, bool fair) {
  if (fair) return dice_.below(static_cast<uint32_t>(ready.size()));
  if (strategy_ == Strategy::pct) {
    size_t best = 0;
    for (size_t i = 1; i < ready.size(); ++i)
      if (priority_[ready[i]] > priority_[ready[best]]) best = i;
    return best;
  }
  const size_t first = dice_.below(static_cast<uint32_t>(ready.size()));
  if (strategy_ == Strategy::random || victim_is_slow_link_) return first;
  for (size_t i = 0; i < ready.size(); ++i) {
    const size_t at = (first + i) % ready.size();
    if (group_of(ready[at]) != victim_) return at;
  }
  return first;
}

unsigned Scheduler::pick_lane(uint32_t ready) {
  // Mostly in order, as a warp would issue them; sometimes any.
  if (dice_.chance(800)) return static_cast<unsigned>(std::countr_zero(ready));
  uint32_t skip = dice_.below(static_cast<uint32_t>(std::popcount(ready)));
  while (skip-- > 0) ready &= ready - 1;
  return static_cast<unsigned>(std::countr_zero(ready));
}

bool Scheduler::goes_on(uint32_t warp, uint64_t step) {
  if (strategy_ != Strategy::pct) return dice_.chance(stay_per_mille_);
  if (next_change_ == changes_.size() || step < changes_[next_change_]) return true;
  ++next_change_;
  demote(warp);
  return false;
}

void Scheduler::demote(uint32_t warp) {
  --lowest_;
  for (uint32_t w = 0; w < priority_.size(); ++w)
    if (group_of(w) == group_of(warp)) priority_[w] = lowest_;
}

uint64_t Scheduler::delivery_delay(uint32_t writers_warp) {
  if (strategy_ == Strategy::starve && victim_is_slow_link_ && group_of(writers_warp) == victim_) return 50000;
  return late_per_mille_ != 0 && dice_.chance(late_per_mille_) ? dice_.below(lateness_) + 1 : 0;
}

uint64_t Scheduler::copy_delay(uint32_t issuers_warp) {
  if (!has_copies_) {
    has_copies_ = true;
    const uint32_t late[][2] = {{0, 0}, {500, 16}, {700, 256}, {1000, 64}, {500, 4096}};
    const uint32_t profile = dice_.below(5);
    late_copies_per_mille_ = late[profile][0];
    copy_lateness_ = late[profile][1];
  }
  if (strategy_ == Strategy::starve && victim_is_slow_link_ && group_of(issuers_warp) == victim_) return 5000;
  return late_copies_per_mille_ != 0 && dice_.chance(late_copies_per_mille_) ? dice_.below(copy_lateness_) + 1
                                                                             : 0;
}

uint32_t Scheduler::choose_value(uint32_t choices) {
  return dice_.chance(400) ? choices - 1 : dice_.below(choices);
}

uint64_t Scheduler::launch_delay() { return dice_.chance(300) ? dice_.below(4096) : 0; }

}  // namespace deepep::emu
