// The kernels' arguments: plain structs, filled by the host and passed by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/counting.hpp"
#include "layout/prefix.hpp"
#include "layout/rank_mask.hpp"
#include "layout/symmetric_layout.hpp"

namespace deepep::kernels {

inline constexpr int kThreads = 1024;

enum class Operation : uint32_t {
  kNone = 0,
  kDispatch = 1,
  kCombine = 2,
  kBarrier = 3,
  kLowLatencyDispatch = 4,
  kLowLatencyCombine = 5,
  kRingSend = 6,
  kRingReceive = 7,
};

/// The reason for which a kernel gave up; bits, since several may be noted at once.
enum class Phase : uint32_t {
  kNone = 0,
  kCounts = 1,          // waiting for a peer's counts and slot; low latency: its words or digest
  kRows = 2,            // waiting for a peer's rows
  kStaging = 4,         // waiting for a peer to have consumed its staging
  kReturn = 8,          // waiting for a row to come back
  kArrival = 16,        // barrier
  kCopyEngine = 32,     // waiting for this rank's own copy engine
  kTooManyRows = 64,    // not a wait: some rank receives more rows than its slot holds
  kDisagreement = 128,  // not a wait: ranks passed different shapes, or one refused
  kOverwritten = 256,   // not a wait: a peer gave this rank up, and its copy engine may have written here
  kWeights = 512,       // low latency: waiting for the weights of a token whose rows are here
  kCredit = 1024,       // ring: waiting for a neighbour to have taken a tensor out of a slot
  kTensor = 2048,       // ring: waiting for a neighbour's tensor
};

/// A fault of this rank, in pinned host memory: the kernel writes it, the host takes it and clears it.
struct FaultRecord {
  uint32_t operation;
  uint32_t phase;    // of the first wait in vain; bits of several Phases if several were noted at once
  uint32_t missing;  // bit r: rank r was waited for in vain
  uint32_t expected;
  uint32_t seen;
  uint32_t pending;  // written last: 1 when the rest is there
  uint32_t masked;   // ranks that low-latency kernels have masked so far, as bits; nobody takes it
  uint32_t missing_of_group[layout::kMaskWords];  // as `missing`, where a group has several domains
};

/// This rank's own words in device memory: they survive graph replays. The host touches them only to clear
/// `phase` and what follows it, after a fault, behind the kernel that noted it; the copy engine writes
/// `ce_completed`.
struct LocalState {
  uint32_t dispatch_epoch;
  uint32_t combine_epoch;
  uint32_t barrier_epoch;
  uint32_t blocks_started;   // blocks of the running kernel that have read its epoch
  uint32_t ce_doorbell;      // the copy engine may begin with its chunks up to this ticket
  uint32_t ce_completed;     // the chunks it has copied, a ticket each
  uint32_t masked;           // low latency: ranks that its kernels have masked, as bits
  uint32_t blocks_finished;  // low latency with masks: blocks of the running kernel that are done
  uint32_t groups_claimed;   // dispatch, top-k: groups of stretches whose ranks some block counts
  uint32_t experts_claimed;  // the same of their experts; expanded: groups of tokens that are numbered
  uint32_t experts_counted;  // groups whose experts have been counted
  uint32_t rows_claimed;     // dispatch, expanded: rows of peers that some warp spreads
  uint32_t pushes_started;   // the same: push blocks that run
  uint32_t phase;
  uint32_t missing;
  uint32_t expected;
  uint32_t seen;
  uint32_t fault_reported;
  uint32_t missing_of_group[layout::kMaskWords];  // as `missing`, where a group has several domains
};

/// The counts of a dispatch for the host while it runs, in pinned memory: tagged words (device/device.hpp), the
/// tag is the call's ticket.
struct HostCounts {
  uint64_t phase;         // 0, or kTooManyRows, kDisagreement, or a wait's phase
  uint64_t num_rows;      // rows this rank receives
  uint64_t max_rows;      // the most any rank receives
  uint64_t num_returned;  // rows that combine will bring back to this rank from others
  uint64_t lists[1];      // [R, R] rows from each rank to each, then [L] top-k entries per local expert
};

/// The things that throughput kernels wait for, rank by rank: Group::waits has a row [R] of each.
enum class Waited : int32_t {
  kMetadata = 0,      // a dispatch: a rank's metadata
  kDispatchRows = 1,  // the flags of its push blocks, beyond that
  kDigest = 2,        // a combine: a rank's digest
  kReturnedRows = 3,  // its rows, beyond that: those of one warp's sums
  kNumKinds = 4,
};

/// The group as a kernel sees it.
struct Group {
  int rank;
  int num_ranks;
  uint32_t live;  // bit r: rank r takes part
  bool shrinks;   // low latency: kernels mask a rank that is missing, and go on
  uint64_t timeout_ns;
  layout::ControlLayout control;
  int64_t staging_offset;
  std::byte* heap[layout::kMaxRanks];  // every rank's heap as mapped here
  LocalState* state;
  FaultRecord* fault;  // pinned host memory
  int64_t* waits;      // [kNumKinds, R] or null: nanoseconds waited for each rank are added (common/waits.hpp)
};

/// A kernel each, chosen by the host.
enum class DispatchMode : int32_t {
  kFresh,    // dispatch/dispatch.hpp: counts and rows are found out, and fill a handle
  kTopk,     // dispatch/topk.hpp: the same, and where tokens go is found out as well
  kExpanded,  // dispatch/expanded.hpp: as kTopk, and received rows are spread to one for each expert
  kCached,   // dispatch/cached.hpp: counts and rows come from the handle
  kRefused,  // dispatch/refused.hpp: posts to the others that this rank takes no part in this call; one block
};

/// Whether a dispatch in that mode finds out from top-k indices where tokens go.
[[nodiscard]] constexpr bool finds_ranks(DispatchMode mode) {
  return mode == DispatchMode::kTopk || mode == DispatchMode::kExpanded;
}

/// The expanded layout of this rank's rows: one for each received one's top-k entry here, grouped by expert.
struct ExpandedRows {
  int32_t* places;         // [T, K]: is written: an entry's place among this rank's of its expert
  std::byte* recv_places;  // [slot capacity, K] int32 in this rank's heap, or null: rows are not spread here
  std::byte* x;            // [capacity, row_bytes]
  uint32_t* scales;        // [capacity, num_scales] if there are scales
  uint32_t* weights;       // [capacity] float32 bits
  uint64_t* slots;         // int64 [slot capacity, K]: the row of each entry, -1 for none
  int32_t* expert_counts;  // [L] entries of each expert
  uint32_t* overflow;      // [1] or null: 1 if an entry had no row
  int32_t* origins;        // [capacity] where scales lie by columns: where a row's come from, is written
  uint32_t* tiles;         // [capacity / 32 + L + 1] likewise: rows that have come of each 32, 0 before
  int64_t capacity;        // rows; where the host waits, and more would come, none is spread
  int alignment;           // experts begin at multiples of it
  bool column_major;       // of scales: a scale's, of all rows rounded up to 4, lie together
  bool zero_padding;       // of rows; scales and weights of gaps are 0 either way
};

/// Whether its kernel has a form that records time lines (lines.hpp).
[[nodiscard]] constexpr bool records(DispatchMode mode) {
  return mode != DispatchMode::kRefused && mode != DispatchMode::kExpanded;
}

/// Of a matrix, in elements.
struct Strides {
  int64_t row, column;
};

struct DispatchArgs {
  Group group;
  DispatchMode mode;
  int push_blocks;   // the last push_blocks blocks write to other ranks
  int local_blocks;  // blocks [0, local_blocks) write rows that stay; both are all blocks, or disjoint
  int64_t num_tokens;
  int num_topk;                  // 0: no top-k travels, as in a cached call, where source tokens do not either
  int num_local_experts;         // L
  int num_scales;                // 4-byte scales per row; 0: none
  int index_bytes;               // 4 or 8
  int64_t row_bytes;             // a multiple of 16
  uint32_t payload;              // a number for what rows and scales are made of, where the caller has one
  const std::byte* x;            // [T, row_bytes]
  const uint32_t* scales;        // [T, num_scales], any strides
  Strides scale_strides;         // from token to token, from scale to scale
  const void* topk_idx;          // [T, K] int32 or int64
  const uint32_t* topk_weights;  // [T, K] float32 bits
  const uint8_t* is_token_in_rank;    // [T, R]
  const int32_t* tokens_per_rank;     // [R]; not used when cached
  const int32_t* tokens_per_expert;   // [E] or null; not used when cached
  int32_t* counts;                    // [R, R] of the handle: read when cached, else written
  int32_t* send_row;                  // [T, R] of the handle: final row at each rank, or -1; likewise
  int64_t slot[layout::kSlotArrays];  // where this rank receives, offsets in its heap; 0: it does not want that
  int64_t slot_capacity;              // rows
  int64_t num_worst_tokens;           // 0, or rows whose index is set to -1 past the last received
  HostCounts* host;                   // null: the host does not wait
  uint32_t ticket;
  // Of modes kTopk and kExpanded:
  uint8_t* marks;        // [T, R]: which ranks each token goes to, is written
  std::byte* counting;   // layout::CountingLayout
  int64_t alone_tokens;   // up to so many tokens each block counts for itself
  ExpandedRows expanded;  // of mode kExpanded
  // What the launch fills in (prepare), so that no warp has to work it out:
  uint32_t common_words[layout::MailboxWords::kCommon];  // posted to all ranks alike
  layout::TokenSplit push_split;                         // the tokens of each push block
  layout::TokenSplit local_split;                        // of each local block
  layout::StretchGroups groups;                          // of mode kTopk, as below
  layout::Divisor experts_per_rank;
};

/// Rows that the copy engine returns instead of SMs, in chunks. It follows orders that the host has put on a
/// stream: waits until ce_doorbell has reached the last chunk's ticket, then copies each chunk to all owners,
/// and stores its ticket in ce_completed.
struct CopyEngineWork {
  layout::ChunkSizes chunks;
  uint32_t last_ticket;  // of the last chunk; those before it have the numbers before
};

/// Who returns rows and who sums them; chosen by the host.
enum class CombineMode : int32_t {
  kSplit,       // combine/combine.hpp: the first push_blocks blocks return rows, the others sum
  kResident,    // the same, but all blocks are resident together: few rows are returned and summed by all warps
  kMixed,       // the same of blocks that each do both
  kCopyEngine,  // combine/copy_engine.hpp: the copy engine returns the rows, all warps sum
  kRefused,     // combine/refused.hpp: posts to the others that this rank takes no part in this call; one block
};

/// The mode of a combine in which SMs return the rows: the first `push_blocks` blocks, while the last
/// `reduce_blocks` sum. If that is all of them, they must be resident together.
[[nodiscard]] constexpr CombineMode combine_mode(int num_blocks, int push_blocks, int reduce_blocks) {
  if (reduce_blocks != num_blocks) return CombineMode::kSplit;
  return push_blocks == num_blocks ? CombineMode::kMixed : CombineMode::kResident;
}

struct CombineArgs {
  Group group;
  CombineMode mode;
  int push_blocks;                // blocks [0, push_blocks) return rows, unless the copy engine does
  int64_t num_tokens;             // T of this rank
  int num_topk;                   // 0: no weights travel
  int64_t row_bytes;              // bf16 rows, a multiple of 16
  layout::StagingLayout staging;  // of rows of this kind
  const std::byte* x;             // [N, row_bytes]; [X, row_bytes] with slots
  const float* topk_weights;      // [N, K]; [X] with slots
  int num_entries;                // K where rows were expanded, at most 32
  const int64_t* slots;           // [N, K] the row of x of each entry, or -1; null: none were expanded
  const float* factors;           // [N, K] by which those are multiplied, or null
  const std::byte* bias[2];       // [T, row_bytes] or null
  const int32_t* counts;          // [R, R] of the handle
  const int32_t* send_row;        // [T, R] of the handle
  std::byte* out;                 // [T, row_bytes]
  float* out_weights;             // [T, K]
  CopyEngineWork copy_engine;     // in its mode
};

/// Whether its kernel has a form that records time lines.
[[nodiscard]] constexpr bool records(const CombineArgs& args) {
  return args.mode != CombineMode::kRefused && args.slots == nullptr;
}

struct LayoutArgs {
  int num_ranks;
  int num_experts;
  int ranks_per_domain;
  int num_topk;
  int index_bytes;
  int64_t num_tokens;
  const void* topk_idx;        // [T, K]
  int32_t* tokens_per_rank;    // [R]
  int32_t* tokens_per_domain;  // [R / ranks_per_domain] or null
  int32_t* tokens_per_expert;  // [E]
  uint8_t* is_token_in_rank;   // [T, R]
  uint32_t* workspace;         // [E + R + domains + 1] zero before and after
};

}  // namespace deepep::kernels
