// A first-fit allocator over one stretch of memory, for torch's caching allocator to take segments from.
//
// torch reaches it through two C functions (CUDAPluggableAllocator), which carry no context: the arena to take from
// is chosen per thread, before, and the arena to give back to is found by address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>

namespace deepep::host {

/// Bytes of every block are a multiple of this: torch asks for multiples of 2 MiB.
inline constexpr int64_t kArenaUnit = 512;

class Arena {
 public:
  Arena(std::byte* base, int64_t bytes) : base_(base), bytes_(bytes / kArenaUnit * kArenaUnit) { free_[0] = bytes_; }

  /// Null if no free stretch is long enough.
  [[nodiscard]] std::byte* take(int64_t bytes) {
    const int64_t wanted = (bytes + kArenaUnit - 1) / kArenaUnit * kArenaUnit;
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
    int64_t offset = block - base_;
    int64_t length = (bytes + kArenaUnit - 1) / kArenaUnit * kArenaUnit;
    used_ -= length;
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

  [[nodiscard]] int64_t used() const { return used_; }
  [[nodiscard]] bool holds(const std::byte* p) const { return p >= base_ && p < base_ + bytes_; }

 private:
  std::byte* base_;
  int64_t bytes_;
  int64_t used_ = 0;
  std::map<int64_t, int64_t> free_;  // offset -> length, no two adjacent
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
  /// Bytes that have not come back.
  [[nodiscard]] int64_t used(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto it = arenas_.find(id);
    return it == arenas_.end() ? 0 : it->second.used();
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
      if (arena.holds(static_cast<std::byte*>(block))) return arena.give_back(static_cast<std::byte*>(block), bytes);
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
