// An operation as the host asks for it: the kernel's arguments, less what a Domain knows itself.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/common/args.hpp"
#include "kernels/ring/args.hpp"

namespace deepep::host {

/// Blocks of a launch by role. The two roles are disjoint and make up the grid, or all blocks have both. Of a
/// combine, all blocks may have the second, whichever have the first.
struct Blocks {
  int total = 1;
  int remote = 1;  // they write to other ranks
  int local = 1;   // they work on rows that stay, or sum
};

/// The counts of a handle [R, R], where the host knows them.
struct RowCounts {
  std::vector<int32_t> counts;
};

// Of `args`, a Domain fills in the group, the blocks and what depends on its heap. `stream` is a cudaStream_t;
// null on the emulator, where a rank has one.

struct DispatchLaunch {
  Blocks blocks;
  kernels::DispatchArgs args{};
  std::byte* received[layout::kSlotArrays] = {};  // in this rank's heap; null: not wanted
  const kernels::ExpandedRows* expanded = nullptr;  // by top-k: what received rows are spread to, or null
  void* stream = nullptr;
};

/// What the cached dispatches along one handle, with rows of one kind, have in common.
struct CachedDispatch {
  int num_blocks;
  kernels::DispatchArgs args;
};

/// What is new in each of them: addresses.
struct CachedRows {
  const std::byte* x = nullptr;
  const uint32_t* scales = nullptr;
  std::byte* recv_x = nullptr;
  std::byte* recv_scales = nullptr;
};

struct CombineLaunch {
  Blocks blocks;
  kernels::CombineArgs args{};
  /// Rows that a copy engine is to return, if it can and the host knows the counts. No chunks: SMs return them.
  layout::ChunkSizes chunks{.num_chunks = 0, .shrink = 100};
  const RowCounts* known = nullptr;
  const int32_t* source_token = nullptr;  // [N] of the handle, read between domains alone; null: N is 0
  void* stream = nullptr;
};

/// A tensor to a neighbour of the ring, or from it.
struct RingLaunch {
  kernels::RingArgs args{};
  std::byte* tensor = nullptr;
  int64_t bytes = 0;
  uint64_t dtype = 0;  // a number for it, the same on all ranks
  void* stream = nullptr;
};

struct LayoutLaunch {
  int num_blocks = 1;
  kernels::LayoutArgs args{};
  void* stream = nullptr;
};

}  // namespace deepep::host
