// Room for the time lines of warps (kernels/common/lines.hpp): each launch that is recorded takes the next part
// of it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/steps.hpp"

namespace deepep::host {

/// A launch while there was room: what its kernel is, and where its lines are, [blocks, warps, kLineWords].
struct RecordedLaunch {
  std::string kernel;
  int num_blocks;
  int num_warps;
  int64_t first_word;  // -1: none were written
};

/// Of one rank and its launches of one kind.
class LineRoom {
 public:
  /// From now on launches record, in memory that is zero and the caller's to keep alive until their end.
  void open(uint64_t* words, int64_t num_words) {
    words_ = words;
    num_words_ = num_words;
    used_ = 0;
    launches_.clear();
  }
  /// No longer; what was launched meanwhile, in that order.
  [[nodiscard]] std::vector<RecordedLaunch> close() {
    words_ = nullptr;
    return std::exchange(launches_, {});
  }
  [[nodiscard]] bool is_open() const { return words_ != nullptr; }

  /// For a launch, where it `can` record and room is left; else nowhere.
  [[nodiscard]] kernels::Lines take(const char* kernel, int num_blocks, int num_warps, bool can) {
    if (!is_open()) return {};
    const int64_t needed = int64_t{num_blocks} * num_warps * kernels::kLineWords;
    const bool records = can && needed <= num_words_ - used_;
    launches_.push_back({kernel, num_blocks, num_warps, records ? used_ : -1});
    if (!records) return {};
    used_ += needed;
    return {words_ + used_ - needed};
  }

 private:
  uint64_t* words_ = nullptr;
  int64_t num_words_ = 0;
  int64_t used_ = 0;
  std::vector<RecordedLaunch> launches_;
};

}  // namespace deepep::host
