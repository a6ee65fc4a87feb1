// Who runs next, and how late a write arrives: every choice a schedule consists of, drawn from one seed.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/machine/memory.hpp"
#include "emulator/run/random.hpp"

namespace deepep::emu {

enum class Strategy : uint8_t {
  random,  // any ready thread, with bursts of seeded length
  pct,     // fixed random priorities of ranks, blocks or warps, changed at a few random steps
  starve,  // one rank, block or warp runs only when nothing else can, or its writes arrive last
};

class Scheduler {
 public:
  /// `expected_steps`: where PCT spreads its changes; a former run's length.
  Scheduler(const Topology& topology, Strategy strategy, uint64_t seed, uint64_t expected_steps);

  /// Index into `ready`, the warps with a thread that can run. Not empty. `fair`: whatever the strategy, any of
  /// them, because those that run only poll for what the others would do.
  [[nodiscard]] size_t pick(const std::vector<uint32_t>& ready, bool fair);
  /// Which lane of the ready ones.
  [[nodiscard]] unsigned pick_lane(uint32_t ready);
  /// Whether the thread of `warp` that is running may go on past a scheduling point.
  [[nodiscard]] bool goes_on(uint32_t warp, uint64_t step);
  /// Whether `other`, now ready, takes over from `warp` at once.
  [[nodiscard]] bool preempts(uint32_t other, uint32_t warp) const {
    return strategy_ == Strategy::pct && priority_[other] > priority_[warp];
  }
  [[nodiscard]] uint64_t delivery_delay(uint32_t writers_warp);
  /// How many steps go by before a copy of that warp reads, or between its reading and its writing.
  [[nodiscard]] uint64_t copy_delay(uint32_t issuers_warp);
  [[nodiscard]] uint32_t choose_value(uint32_t choices);
  [[nodiscard]] uint64_t launch_delay();
  [[nodiscard]] uint64_t below(uint64_t n) { return n == 0 ? 0 : dice_.next() % n; }

 private:
  void demote(uint32_t warp);
  [[nodiscard]] uint32_t group_of(uint32_t warp) const { return warp / warps_per_group_; }

  Strategy strategy_;
  Random dice_;
  uint32_t warps_per_group_;          // what PCT and starve treat alike: a rank's, a block's, or one
  uint32_t victim_ = 0;               // starve: the group
  bool victim_is_slow_link_ = false;  // starve: its writes are late, rather than itself
  uint32_t stay_per_mille_;           // random: how likely a thread goes on at a point
  uint32_t late_per_mille_;           // of writes that arrive late
  uint32_t lateness_;                 // up to how many steps
  bool has_copies_ = false;           // the two below are drawn with the first copy
  uint32_t late_copies_per_mille_ = 0;
  uint32_t copy_lateness_ = 0;
  std::vector<int64_t> priority_;  // pct, by warp
  std::vector<uint64_t> changes_;  // pct: steps, ascending
  size_t next_change_ = 0;
  int64_t lowest_ = 0;
};

}  // namespace deepep::emu
