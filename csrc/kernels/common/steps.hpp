// What a time line is made of (lines.hpp), for the host as well.
#pragma once

#include <cstdint>

namespace deepep::kernels {

/// What a warp is at. `deepep/runtime/warp_lines.py` has the same list.
enum class Step : uint32_t {
  kEnd = 0,           // of its work in this launch
  kStart = 1,         // the call's epoch, its own part of it
  kCount = 2,         // counts tokens or rows, and where its own go
  kPost = 3,          // its rank's counts, words or digest to all ranks
  kWaitMetadata = 4,  // waits for those of all ranks
  kPushRows = 5,      // rows to other ranks
  kLocalRows = 6,     // rows that stay on this rank
  kSignal = 7,        // raises flags behind rows
  kWaitCredit = 8,    // waits until peers' staging is free
  kWaitWeights = 9,   // waits for weights that come with a low-latency combine
  kWaitRows = 10,     // waits for rows of peers, by their flags
  kReduce = 11,       // sums rows that are here
  kSpread = 12,       // received messages to their experts' rows
  kFinish = 13,       // waits for its block
  kNumSteps = 14,
};

inline constexpr uint32_t kLineSteps = 127;  // that a warp keeps
inline constexpr int64_t kLineWords = 1 + kLineSteps;
inline constexpr int kLineTimeBits = 56;

/// Where a launch writes its warps' time lines: [blocks, warps, kLineWords], zero; null: nowhere.
struct Lines {
  uint64_t* words = nullptr;
};

/// What a kernel that records is given.
template <class Args>
struct Recorded {
  Args args;
  Lines lines;
};

}  // namespace deepep::kernels
