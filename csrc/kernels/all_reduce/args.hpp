// All-reduces over symmetric memory: their arguments, and the state that they keep between calls.
#pragma once

#include "kernels/common/args.hpp"
#include "layout/all_reduce_slots.hpp"
#include "layout/gradient_codec.hpp"

namespace deepep::kernels {

inline constexpr int kReduceThreads = 512;

/// This rank's own words in device memory, zero before the first call: they survive graph replays.
struct AllReduceState {
  uint32_t epoch;
  uint32_t blocks_started;  // blocks of the running kernel that have read its epoch
  uint32_t missing;         // bit r: rank r was waited for in vain, in any call so far: later ones do nothing
};

/// Messages between ranks: codes of layout/gradient_codec.hpp, or the tensor's own elements.
enum class ReduceFormat : int32_t { kPlain = 0, kFp8 = 1, kFp16 = 2, kBf16 = 3 };

struct AllReduceArgs {
  int rank;
  int num_ranks;
  uint64_t timeout_ns;
  layout::AllReduceSlots slots;
  std::byte* heap[layout::kMaxRanks];  // every rank's as mapped here, control_bytes() of it zero
  AllReduceState* state;
  uint32_t* host_missing;  // the same word as the state's in pinned host memory, or null
  std::byte* tensor;       // [count] addends, in whose place the results come
  int64_t count;
  bool is_bf16;      // else float32
  bool is_aligned;   // four elements from any fourth on are one access
  bool is_fixed;     // sums in fixed point, of plain messages; else in float32, ranks ascending
  bool is_nearest;   // else by dice
  int headroom;      // in fixed point: bits that a sum needs beyond an addend
  float divisor;
  ReduceFormat format;
  uint32_t first_index;  // of the first element in its tensor, for dice
  layout::RoundingKey addend_key, result_key;
};

}  // namespace deepep::kernels
