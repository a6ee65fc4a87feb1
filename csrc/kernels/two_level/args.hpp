// The arguments of the two-level kernels: those of one level, and what lies between domains.
#pragma once

#include "device/device.hpp"
#include "kernels/common/args.hpp"
#include "layout/rank_mask.hpp"
#include "layout/rail_layout.hpp"
#include "layout/return_layout.hpp"

namespace deepep::kernels {

inline constexpr int kMaxRails = layout::kMaxGroupRanks;

/// This rank's words about its rails, in device memory: they survive graph replays, and counts never go back.
struct RailState {
  uint64_t sent[kMaxRails];                   // windows to each rail's peer
  uint64_t received[kMaxRails];               // windows from it
  uint64_t returned[layout::kMaxGroupRanks];  // windows of each source that combines have summed
  uint64_t dispatches;
  uint64_t combines;
  uint32_t claimed;                  // items of the running kernel that blocks have taken
  uint32_t forwarded[kMaxRails][2];  // chunks of each rail's window that were read, by half
  uint32_t summed[layout::kMaxGroupRanks][2];  // the same of each staging slot's window that were summed
};

/// Who is joined to whom, as the host works it out (host/rails.hpp). Of two bytes each: arguments are short.
struct Rails {
  int num_rails;
  int16_t peer[kMaxRails];   // ranks, ascending
  int16_t there[kMaxRails];  // the number that the peer gives to this rail
  /// The rails on which this rank's tokens cross, one to each other domain that has a living rank; and that
  /// domain's first rank and size.
  int num_out;
  int16_t out[layout::kMaxDomains];
  int16_t out_first[layout::kMaxDomains];
  int16_t out_size[layout::kMaxDomains];
  /// The rails of whose peers this rank is the gateway.
  int num_in;
  int16_t in[kMaxRails];
  /// By source: the local index of its gateway in this rank's domain (-1: it is masked), and its number among
  /// the sources of that gateway, whose own is 0.
  int16_t gateway[layout::kMaxGroupRanks];
  int16_t slot[layout::kMaxGroupRanks];
};

/// The whole group. Its ranks that share this one's domain are a Group as well, numbered from 0 there: that of
/// the operation's arguments, so that what writes rows, and knows nothing of domains, writes to neighbours.
struct AllRanks {
  int rank;
  int num_ranks;
  int first_neighbour;  // the domain's first rank
  layout::RankMask live;
};

/// What both operations share.
struct TwoLevelArgs {
  AllRanks all;
  Rails rails;
  layout::RailLayout layout;
  layout::ReturnStaging staging;
  std::byte* remote;  // this rank's memory that its NIC knows
  dev::Wire wire;     // by which it puts
  RailState* state;
};

/// `dispatch`: its group are the neighbours, its counts and rows those of all ranks. Its roles are those of
/// blocks that do everything.
struct TwoLevelDispatchArgs {
  DispatchArgs dispatch;
  TwoLevelArgs two_level;
  layout::CrossingRecord<int64_t> record;
  int32_t*
      before;  // [ceil(T / kChunkRecords), R]: tokens of earlier chunks for each rank; not used when cached
};

/// `combine`: likewise.
struct TwoLevelCombineArgs {
  CombineArgs combine;
  TwoLevelArgs two_level;
  layout::ReturnRecord<int64_t> record;
  const int32_t* source_token;  // [N] of the handle: which token of its rank each received row is
};

/// Of the kernel before a dispatch that is not cached.
struct TwoLevelPrefixArgs {
  int num_ranks;
  int64_t num_tokens;
  const uint8_t* is_token_in_rank;  // [T, R]
  int32_t* before;
};

/// What a launch passes by value; with more the driver would have to copy it to memory of its own.
inline constexpr size_t kMaxArgumentBytes = 4096;
static_assert(sizeof(TwoLevelDispatchArgs) <= kMaxArgumentBytes);
static_assert(sizeof(TwoLevelCombineArgs) <= kMaxArgumentBytes);

}  // namespace deepep::kernels
