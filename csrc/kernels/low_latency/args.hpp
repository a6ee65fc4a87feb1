// What the low-latency kernels are given: plain structs, filled by the host and passed by value.
#pragma once

#include "kernels/common/args.hpp"
#include "layout/low_latency_slots.hpp"

namespace deepep::kernels {

/// Which halves a launch has. A send is followed by its receive before another operation begins.
enum class Halves : int { kBoth = 0, kSend = 1, kReceive = 2 };

/// What goes back of a token that came.
enum class Returned : int {
  kSums = 0,     // one row: the sum of its experts' rows, weighted; the owner sums those, ranks ascending
  kSumsInLogfmt = 1,
  kEntries = 2,  // a row for each of its top-k entries; the owner weights and sums all, k ascending
  kEntriesInLogfmt = 3,
};

/// What a combine needs of its dispatch, in memory that the handle owns.
struct LowLatencyHandle {
  uint32_t* identity;  // [2]: the dispatch's epoch, 0 if it failed, and a hash of its top-k
  uint32_t* sent;      // [T]: the ranks that this rank's token went to, as bits
  uint32_t* came;      // [R, M / 32, rounded up]: tokens that came from each source, as bits
  uint32_t* routes;    // [R, M, 2 K]: their headers, with the numbers of rows among all of their expert
};

/// How a launch shares out its work, and what else the host works out so that no warp has to (share.hpp).
struct LowLatencyShare {
  uint32_t digest;       // of what ranks must pass alike
  int first_sender;      // of the blocks that send tokens: 1 if block 0, which posts words, can be spared
  int first_worker;      // of those that have messages, the same
  int num_sources;       // whose messages are dealt to blocks: R, or R - 1 without this rank
  int tokens_per_block;  // one block's tokens: side by side in a dispatch, num_blocks apart in a combine
  int token_shift;       // 2^token_shift warps share a token that is sent or summed,
  int strip_shift;       // messages are dealt to blocks in 2^strip_shift strips,
  int message_shift;     // of which 2^message_shift warps share one,
  int own_shift;         // in a dispatch, one of this rank's own
  int rank_shift;        // 2^rank_shift >= R
  int num_warps;         // of a block
  int staged_rows;       // in a combine, that a warp has room for in shared memory, each
  int staged_bytes;      // so many of this warp's part
  layout::Divisor by_local_experts;
  layout::Divisor by_topk;
  layout::Divisor by_tokens;  // T, and
  layout::Divisor by_rest;    // M - T; 1 in place of 0
  layout::Divisor by_words;   // of a source, in a dispatch
};

struct LowLatencyDispatchArgs {
  Group group;  // its heaps are laid out by `slots`, and its state and fault record are low latency's own
  layout::LowLatencySlots slots;
  LowLatencyShare share;
  LowLatencyHandle handle;
  bool refused;         // only post to the others that this rank does not take part in this call
  bool elsewhere;       // with `refused`: the call is made by other means; no fault if it is on all ranks
  bool weights_travel;  // with the rows; else combine sends them
  bool casts;           // to FP8
  bool rounds_scales;
  bool packs_scales;  // UE8M0
  int num_tokens;     // T
  int max_tokens;     // M of the call
  int num_topk;
  int num_local_experts;         // L
  int hidden;                    // H
  int index_bytes;               // 4 or 8
  const std::byte* x;            // [T, H] bf16
  const void* topk_idx;          // [T, K]
  const uint32_t* topk_weights;  // [T, K] float32 bits, if they travel; null too where T is 0
  std::byte* recv_x;             // [L, R * M, H]
  uint32_t* recv_scales;         // float32 or UE8M0, column-major: [L, columns, R * M]
  int32_t* recv_count;           // [L]
  int32_t* recv_source;          // [L, R * M]: the token of its rank that a row is; -1 past the count
  int64_t* recv_range;           // [L, R]
  int64_t* waits;                // [R] or null: nanoseconds waited for each rank are added
};

struct LowLatencyCombineArgs {
  Group group;
  layout::LowLatencySlots slots;
  LowLatencyShare share;
  LowLatencyHandle handle;
  bool refused;  // as of a dispatch
  bool elsewhere;
  bool weights_travelled;  // with the dispatch; else they are sent first, where sums go back
  Returned returned;
  int num_tokens;
  int max_tokens;
  int num_topk;
  int num_local_experts;
  int hidden;
  int index_bytes;
  const std::byte* x;            // [L, R * M, H] bf16
  const void* topk_idx;          // [T, K], the dispatch's
  const uint32_t* topk_weights;  // [T, K] float32 bits
  std::byte* out;                // [T, H] bf16
  int64_t* waits;                // as of a dispatch
};

/// Whether a launch has a form that records time lines (common/lines.hpp).
[[nodiscard]] constexpr bool records(const LowLatencyDispatchArgs& args, Halves halves) {
  return halves == Halves::kBoth && !args.group.shrinks && args.waits == nullptr;
}
[[nodiscard]] constexpr bool records(const LowLatencyCombineArgs& args, Halves halves) {
  return halves == Halves::kBoth && args.returned == Returned::kSums && !args.group.shrinks &&
         args.waits == nullptr;
}

}  // namespace deepep::kernels
