// Kernels that serve the puts which others order (device/put_queue.hpp): over NVSHMEM, in a module of its own
// (deepep._nvshmem), so that no other needs NVSHMEM; and inside one process, between virtual ranks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/put_queue.hpp"
#include "layout/arith.hpp"
#include "layout/rank_mask.hpp"

namespace deepep::put_server {

/// One rank's orders, for one operation: the kernel ends when that has ended and all is on its way.
struct PutService {
  dev::PutQueue queue;
  int pe[layout::kMaxGroupRanks] = {};  // by rank, NVSHMEM's number of its process
  uint64_t timeout_ns = 0;              // it ends then at the latest
};

/// Launches it on a stream, a cudaStream_t: one block, beside the operation's. Throws std::runtime_error with
/// CUDA's words.
using ServePuts = void (*)(const PutService& service, void* stream);

/// Virtual ranks of a GPU: so many have a block each that is resident beside the others'.
inline constexpr int kMaxVirtualRanks = 64;

/// Of virtual ranks: all ranks' orders, one block a rank, by plain stores that come late and out of order.
struct LocalService {
  int num_ranks = 0;
  dev::PutQueue queue[kMaxVirtualRanks];
  std::byte* remote[kMaxVirtualRanks] = {};     // by rank, its memory for puts
  uint32_t silent_from[kMaxVirtualRanks] = {};  // orders of this number and later ones are lost
  uint64_t timeout_ns = 0;
  uint64_t delay_ns = 0;  // the longest of an order
  uint64_t seed = 0;
};

void serve_locally(const LocalService& service, void* stream);

}  // namespace deepep::put_server
