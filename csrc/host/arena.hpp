// A first-fit allocator over one stretch of memory, for torch's caching allocator to take segments from.
//
// torch reaches it through two C functions (CUDAPluggableAllocator), which carry no context: the arena to take
// from is chosen per thread, before, and the arena to give back to is found by address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>

namespace deepep::host {

/// Bytes of every block are a multiple of this: torch asks for multiples of 2 MiB.
inline constexpr int64_t kArenaUnit = 512;

/// A block that came back is not free yet: torch gives back what stands free in stream order, and whoever takes
/// it next may be on another stream. It rests until its owner, who knows the streams, calls `free_returned`.
class Arena {
 public:
  Arena(std::byte* base, int64_t bytes) : base_(base), end_(bytes / kArenaUnit * kArenaUnit) {
    if (end_ > 0) free_[0] = end_;
  }

  /// The lowest place that is long enough; null if none is.
  [[nodiscard]] std::byte* take(int64_t bytes) {
    const int64_t wanted = in_units(bytes);
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const auto [offset, length] = *it;
      if (length < wanted) continue;
      free_.erase(it);
      used_ += wanted;
      if (length > wanted) free_[offset + wanted] = length - wanted;
      return base_ + offset;
    }
    return nullptr;
  }

  void give_back(std::byte* block, int64_t bytes) {
    used_ -= in_units(bytes);
    resting_.push_back({block - base_, in_units(bytes)});
  }

  /// How many blocks have come back since the beginning.
  [[nodiscard]] int64_t returned() const { return freed_ + static_cast<int64_t>(resting_.size()); }

  /// The first `count` of all that came back are free.
  void free_returned(int64_t count) {
    for (; freed_ < count && !resting_.empty(); ++freed_) {
      set_free(resting_.front().offset, resting_.front().length);
      resting_.pop_front();
    }
  }

  /// Sets the last `bytes` aside, for good: nothing is taken there any more. Null if they are not all free;
  /// what was set aside before stays so.
  [[nodiscard]] std::byte* reserve_tail(int64_t bytes) {
    const int64_t more = in_units(bytes) - tail_;
    const int64_t limit = end_ - tail_;
    if (more > 0) {
      const auto last = free_.empty() ? free_.end() : std::prev(free_.end());
      if (last == free_.end() || last->first + last->second != limit || last->second < more) return nullptr;
      last->second -= more;
      if (last->second == 0) free_.erase(last);
      tail_ += more;
    }
    return base_ + end_ - in_units(bytes);
  }

  /// Bytes that were taken and have not come back.
  [[nodiscard]] int64_t used() const { return used_; }
  [[nodiscard]] bool holds(const std::byte* p) const { return p >= base_ && p < base_ + end_; }

 private:
  struct Stretch {
    int64_t offset;
    int64_t length;
  };

  static int64_t in_units(int64_t bytes) { return (bytes + kArenaUnit - 1) / kArenaUnit * kArenaUnit; }

  void set_free(int64_t offset, int64_t length) {
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + length) {
      length += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        offset = previous->first;
        length += previous->second;
        free_.erase(previous);
      }
    }
    free_[offset] = length;
  }

  std::byte* base_;
  int64_t end_;
  int64_t used_ = 0;
  int64_t tail_ = 0;
  int64_t freed_ = 0;              // of the blocks that came back, how many are free again
  std::map<int64_t, int64_t> free_;  // offset -> length, no two adjacent
  std::deque<Stretch> resting_;      // the others, in the order in which they came
};

/// The arenas of this process.
class Arenas {
 public:
  /// An id for `select` and `close`.
  [[nodiscard]] int64_t open(std::byte* base, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    arenas_.emplace(++last_id_, Arena(base, bytes));
    return last_id_;
  }
  void close(int64_t id) {
    const std::lock_guard lock(mutex_);
    arenas_.erase(id);
  }
  /// What `ask` says of an arena; of one that is closed, what it says of an empty one.
  template <class Ask>
  auto of(int64_t id, const Ask& ask) {
    const std::lock_guard lock(mutex_);
    const auto it = arenas_.find(id);
    if (it != arenas_.end()) return ask(it->second);
    Arena none(nullptr, 0);
    return ask(none);
  }
  /// The arena that this thread's next allocations come from; 0: none.
  void select(int64_t id) { selected_ = id; }

  [[nodiscard]] void* take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto it = arenas_.find(selected_);
    return it == arenas_.end() ? nullptr : it->second.take(bytes);
  }
  void give_back(void* block, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto& [id, arena] : arenas_)
      if (arena.holds(static_cast<std::byte*>(block)))
        return arena.give_back(static_cast<std::byte*>(block), bytes);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, Arena> arenas_;
  int64_t last_id_ = 0;
  static thread_local int64_t selected_;
};

inline thread_local int64_t Arenas::selected_ = 0;

/// The one registry of the process.
inline Arenas& arenas() {
  static Arenas instance;
  return instance;
}

}  // namespace deepep::host
