// Vector clocks: what a thread knows of every other. A thread's knowledge is a shared clock plus its own time,
// so that the threads of a block, which know the same after every barrier, share one clock, and only a thread
// that learns something alone pays for a copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace deepep::emu {

/// A place in every clock: one per thread of the machine, and a few for hosts.
using Slot = uint32_t;
using Time = int32_t;

/// A moment of one thread. Time 0 is before everything, and known to all.
struct Epoch {
  Slot slot = 0;
  Time time = 0;
  friend bool operator==(const Epoch&, const Epoch&) = default;
};

class ClockPool;

/// Shared, immutable while shared. `refs` is not atomic: a simulation runs on one thread.
struct Clock {
  ClockPool* pool;
  uint32_t refs;
  alignas(16) Time at[];
};

class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) {}  // takes over the reference
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_) ++clock_->refs;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  inline ~ClockRef();

  [[nodiscard]] Time operator[](Slot slot) const { return clock_->at[slot]; }
  [[nodiscard]] bool knows(Epoch epoch) const { return clock_->at[epoch.slot] >= epoch.time; }
  [[nodiscard]] explicit operator bool() const { return clock_ != nullptr; }
  [[nodiscard]] const Clock* get() const { return clock_; }

  /// Makes the clock this reference's own and raises one entry.
  inline void raise(Epoch epoch);
  /// Makes the clock this reference's own and takes the later of each entry.
  inline void join(const ClockRef& other);

 private:
  friend class ClockPool;
  inline void own();
  Clock* clock_ = nullptr;
};

class ClockPool {
 public:
  /// `width` is rounded up so that a join works on whole vectors.
  explicit ClockPool(Slot width) : width_((width + 15u) & ~Slot{15}) {}
  ClockPool(const ClockPool&) = delete;
  ClockPool& operator=(const ClockPool&) = delete;
  ~ClockPool() {
    for (Clock* clock : all_) std::free(clock);
  }

  [[nodiscard]] Slot width() const { return width_; }
  [[nodiscard]] ClockRef zero() {
    Clock* clock = take();
    std::memset(clock->at, 0, width_ * sizeof(Time));
    return ClockRef(clock);
  }
  [[nodiscard]] Clock* copy(const Clock& other) {
    Clock* clock = take();
    std::memcpy(clock->at, other.at, width_ * sizeof(Time));
    return clock;
  }
  void give(Clock* clock) { free_.push_back(clock); }

 private:
  Clock* take() {
    Clock* clock;
    if (free_.empty()) {
      clock = static_cast<Clock*>(std::malloc(sizeof(Clock) + width_ * sizeof(Time)));
      if (clock == nullptr) throw std::bad_alloc();
      all_.push_back(clock);
    } else {
      clock = free_.back();
      free_.pop_back();
    }
    clock->pool = this;
    clock->refs = 1;
    return clock;
  }

  Slot width_;
  std::vector<Clock*> free_;
  std::vector<Clock*> all_;
};

inline ClockRef::~ClockRef() {
  if (clock_ && --clock_->refs == 0) clock_->pool->give(clock_);
}

inline void ClockRef::own() {
  if (clock_->refs == 1) return;
  --clock_->refs;
  clock_ = clock_->pool->copy(*clock_);
}

inline void ClockRef::raise(Epoch epoch) {
  if (knows(epoch)) return;
  own();
  clock_->at[epoch.slot] = epoch.time;
}

inline void ClockRef::join(const ClockRef& other) {
  if (!other.clock_ || other.clock_ == clock_) return;
  if (!clock_) {
    *this = other;
    return;
  }
  own();
  typedef Time Vector __attribute__((vector_size(16), may_alias, aligned(16)));
  const Slot width = clock_->pool->width();
  for (Slot i = 0; i < width; i += 4) {
    auto& mine = *reinterpret_cast<Vector*>(clock_->at + i);
    const auto& theirs = *reinterpret_cast<const Vector*>(other.clock_->at + i);
    mine = mine > theirs ? mine : theirs;
  }
}

}  // namespace deepep::emu
