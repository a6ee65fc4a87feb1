// Puts between virtual ranks, which share a GPU: their kernels do not know that no NIC carries them.
#include "put_server/serve.cuh"
#include "kernels/common/launch.cuh"
#include "put_server/service.hpp"

namespace deepep::put_server {

namespace {

/// Words of a mix, each as good as random: SplitMix64's steps.
__device__ uint64_t mixed(uint64_t word) {
  word += 0x9e3779b97f4a7c15;
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
  word = (word ^ (word >> 27)) * 0x94d049bb133111eb;
  return word ^ (word >> 31);
}

/// One warp; sizes are multiples of 4, places of 16 where the size is.
__device__ void copy(std::byte* to, const std::byte* from, int64_t bytes) {
  using namespace dev;
  const int64_t pieces = bytes / 16;
  for (int64_t i = lane(); i < pieces; i += kWarpSize)
    store_streaming(reinterpret_cast<Vec16*>(to) + i, load_streaming(reinterpret_cast<const Vec16*>(from) + i));
  for (int64_t at = 16 * pieces + 4 * lane(); at < bytes; at += 4 * kWarpSize)
    store(reinterpret_cast<uint32_t*>(to + at), load(reinterpret_cast<const uint32_t*>(from + at)));
}

/// Ranks of a block: where each had its own, these would be on as many SMs, which the ranks' own blocks fill.
constexpr int kRanksOfBlock = 4;

__global__ void __launch_bounds__(kThreads* kRanksOfBlock)
    serve_locally_kernel(const __grid_constant__ LocalService service) {
  using namespace dev;
  // One that takes no part, or that there is not, has no queue.
  const int self = kRanksOfBlock * block() + thread() / kThreads;
  serve(service.queue[self], service.timeout_ns, [&](const PutOrder& order, uint32_t number) {
    const uint64_t word = mixed(service.seed + (static_cast<uint64_t>(self) << 32 | number));
    if (service.delay_ns > 0)
      for (const Deadline late = Deadline::in(word % service.delay_ns); !late.passed();) pause();
    if (number >= service.silent_from[self]) return;
    const auto there = [&](const void* here) {
      return service.remote[order.rank] + (static_cast<const std::byte*>(here) - service.remote[self]);
    };
    if (order.bytes > 0) copy(there(order.to), static_cast<const std::byte*>(order.from), order.bytes);
    sync_warp();
    if (lane() != 0) return;
    fence<acq_rel, sys_scope>();
    fetch_add<relaxed, sys_scope>(reinterpret_cast<uint64_t*>(there(order.word)), order.value);
  });
}

}  // namespace

void serve_locally(const LocalService& service, void* stream) {
  const int blocks = (service.num_ranks + kRanksOfBlock - 1) / kRanksOfBlock;
  serve_locally_kernel<<<blocks, kThreads * kRanksOfBlock, 0, static_cast<cudaStream_t>(stream)>>>(service);
  kernels::check(cudaGetLastError(), "serve_locally");
}

}  // namespace deepep::put_server
