// Arguments of the kernels of a layer that a rank runs on its own: the choice of experts; received rows to rows
// sorted by expert, and back.
//
// N received rows of `row_bytes`, K top-k entries each; P pairs: the entries that name a local expert, sorted
// by expert, then row, then k. slots [N, K]: where an entry's pair is, -1 for entries that name none.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepep::kernels {

inline constexpr int kRowThreads = 256;
/// Entries of a row: a warp looks at all at once.
inline constexpr int kMaxRowEntries = 32;
/// A block counts in shared memory.
inline constexpr int kMaxCountedExperts = 8192;
/// Channels that share a scale.
inline constexpr int kScaleGroup = 128;

struct SortPairsArgs {
  const void* topk_idx;  // [N, K] local expert, or -1
  int index_bytes;       // 4 or 8
  int num_local_experts;
  int64_t num_entries;  // N * K
  int64_t num_pairs;    // P, as counted beforehand: with another count no entry past it has a slot
  int64_t* pairs;       // [P] row * K + k; 0 past the last
  int64_t* slots;       // [N, K], or -1
  int32_t* ends;        // [L] the end of each expert's pairs, P at most
};

struct SelectTopkArgs {
  int64_t num_tokens;   // T
  int num_experts;      // E
  int num_topk;         // K, at most E
  const float* scores;  // [T, E]
  int64_t* topk_idx;    // [T, K]
};

struct CountEntriesArgs {
  const void* topk_idx;  // [T, K] global expert; what names none is not counted
  int index_bytes;       // 4 or 8
  int num_experts;       // E, at most kMaxCountedExperts
  int64_t num_entries;   // T * K
  uint64_t* load;        // [E]: added to
};

/// The rows of every kernel below.
struct RowSpan {
  int64_t num_rows;      // N
  int64_t row_bytes;     // a multiple of 16
  int num_topk;          // K, at most kMaxRowEntries
  const int64_t* slots;  // [N, K]
};

struct SpreadRowsArgs {
  RowSpan rows;         // as they are spread
  const std::byte* x;   // [N, row_bytes]; with scales [N, row_bytes / 2] e4m3
  const float* scales;  // [N, row_bytes / 256], of 128 channels each: rows become bf16. Or null
  std::byte* out;       // [P, row_bytes]
};

struct CastRowsArgs {
  int64_t num_channels;  // T * H, a multiple of 128
  const std::byte* x;    // [T, H] bf16
  std::byte* values;     // [T, H] e4m3
  float* scales;         // [T, H / 128]
};

struct ReduceRowsArgs {
  RowSpan rows;
  const std::byte* y;    // [P, row_bytes] bf16
  const float* weights;  // [N, K], or null: none
  std::byte* out;        // [N, row_bytes] bf16
};

struct WeighRowsArgs {
  RowSpan rows;
  const std::byte* grad;  // [N, row_bytes] bf16: of the sums
  const std::byte* y;     // [P, row_bytes] bf16: what was summed
  const float* weights;   // [N, K]
  std::byte* out;         // [P, row_bytes] bf16: the gradient of y
  float* out_weights;     // [N, K]: of the weights, 0 where there is no pair
};

struct SwigluArgs {
  int64_t num_rows;
  int64_t width;          // F, a multiple of 8
  const std::byte* h;     // [P, 2F] bf16: gate, then up
  const std::byte* grad;  // [P, F] bf16: of the output; null in the forward
  std::byte* out;         // forward [P, F] bf16; backward [P, 2F] bf16, the gradient of h
};

}  // namespace deepep::kernels
