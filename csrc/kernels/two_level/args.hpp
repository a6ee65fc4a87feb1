// The arguments of the two-level kernels: those of one level, and what lies between domains.
#pragma once

#include "device/device.hpp"
#include "kernels/common/args.hpp"
#include "layout/rail_layout.hpp"
#include "layout/return_layout.hpp"

namespace deepep::kernels {

inline constexpr int kMaxRails = layout::kMaxRanks;

/// This rank's words about its rails, in device memory: they survive graph replays, and counts never go back.
struct RailState {
  uint64_t sent[kMaxRails];              // windows to each rail's peer
  uint64_t received[kMaxRails];          // windows from it
  uint64_t returned[layout::kMaxRanks];  // windows of each source that combines have summed
  uint64_t dispatches;
  uint64_t combines;
  uint32_t claimed;                       // items of the running kernel that blocks have taken
  uint32_t forwarded[kMaxRails][2];       // chunks of each rail's window that were read, by half
  uint32_t summed[layout::kMaxRanks][2];  // chunks of each staging slot's window that were summed, by half
};

/// Who is joined to whom, as the host works it out (host/rails.hpp).
struct Rails {
  int num_rails;
  int peer[kMaxRails];   // ranks, ascending
  int there[kMaxRails];  // the number that the peer gives to this rail
  /// The rails on which this rank's tokens cross, one to each other domain that has a living rank; and that
  /// domain's first rank and size.
  int num_out;
  int out[kMaxRails];
  int out_first[kMaxRails];
  int out_size[kMaxRails];
  /// The rails of whose peers this rank is the gateway.
  int num_in;
  int in[kMaxRails];
  /// By source: its gateway in this rank's domain (-1: it is masked), and its number among the sources of that
  /// gateway, whose own is 0.
  int gateway[layout::kMaxRanks];
  int slot[layout::kMaxRanks];
};

/// What both operations share.
struct TwoLevelArgs {
  Group near;  // as the group's, but only neighbours, and this rank, are live: those whose heaps are mapped
  int first_neighbour;
  int num_neighbours;
  Rails rails;
  layout::RailLayout layout;
  layout::ReturnStaging staging;
  std::byte* remote;  // this rank's memory that its NIC knows
  dev::Wire wire;     // by which it puts
  RailState* state;
};

/// `dispatch`: the group's live ranks are all that take part. Its roles are those of blocks that do everything.
struct TwoLevelDispatchArgs {
  DispatchArgs dispatch;
  TwoLevelArgs two_level;
  layout::CrossingRecord<int64_t> record;
  int32_t*
      before;  // [ceil(T / kChunkRecords), R]: tokens of earlier chunks for each rank; not used when cached
};

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

}  // namespace deepep::kernels
