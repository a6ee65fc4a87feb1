// The two-level kernels' source once more, as kernels of grids [blocks, ranks]: a row of blocks is a rank.
#include <cstring>

#include "device/device.hpp"

#undef DEEPEP_KERNEL
#define DEEPEP_KERNEL(name, Args, threads)                                          \
  DEEPEP_DEVICE void name##_body(const Args& args);                                 \
  __global__ void __launch_bounds__(threads, 1) name##_of_ranks(const Args* ranks) { \
    name##_body(ranks[blockIdx.y]);                                                 \
  }                                                                                 \
  DEEPEP_DEVICE void name##_body(const Args& args)

#include "kernels/two_level/combine.hpp"
#include "kernels/two_level/dispatch.hpp"
#include "kernels/two_level/dispatch_cached.hpp"
#include "kernels/two_level/prefix.hpp"

#include "kernels/common/launch.cuh"
#include "virtual_ranks/gathered.hpp"

namespace deepep::virtual_ranks {

namespace {

using namespace kernels;

constexpr size_t kMostBytes = 4096;  // of a kernel's arguments

/// Kernel: void (*)(const Args*).
template <class Args, class Kernel>
void launch_ranks(Kernel kernel, Gathered<Args>& gathered, const Launches& launches, int threads,
                  int64_t shared_bytes, void* on) {
  static_assert(sizeof(Args) <= kMostBytes);
  if (gathered.ranks.empty()) return;
  if (gathered.ranks.size() > layout::kMaxGroupRanks) throw std::invalid_argument("more than 256 ranks");
  auto* stream = static_cast<cudaStream_t>(on);
  void* const ranks = launches.memory.get();
  const size_t bytes = gathered.ranks.size() * sizeof(Args);
  std::memcpy(launches.staged.get(), gathered.ranks.data(), bytes);
  check(cudaMemcpyAsync(ranks, launches.staged.get(), bytes, cudaMemcpyHostToDevice, stream), "arguments");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "shared memory");
  const dim3 grid(static_cast<unsigned>(gathered.num_blocks), static_cast<unsigned>(gathered.ranks.size()));
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(
      static_cast<const Args*>(ranks));
  check(cudaGetLastError(), "virtual ranks");
  check(cudaStreamSynchronize(stream), "virtual ranks");
  gathered = {};
}

}  // namespace

Launches::Launches() {
  load(two_level_prefix_kernel_of_ranks, "two_level_prefix");
  load(two_level_dispatch_kernel_of_ranks, "two_level_dispatch");
  load(two_level_dispatch_cached_kernel_of_ranks, "two_level_dispatch_cached");
  load(two_level_combine_kernel_of_ranks, "two_level_combine");
  void* made = nullptr;
  check(cudaMalloc(&made, layout::kMaxGroupRanks * kMostBytes), "arguments of virtual ranks");
  memory.reset(made, cudaFree);
  check(cudaMallocHost(&made, layout::kMaxGroupRanks * kMostBytes), "arguments of virtual ranks");
  staged.reset(made, cudaFreeHost);
}

void launch(Launches& launches, void* stream) {
  launch_ranks(two_level_prefix_kernel_of_ranks, launches.prefix, launches, kThreads, 16, stream);
  auto& dispatches = launches.dispatch.ranks;
  for (TwoLevelDispatchArgs& args : dispatches)
    prepare(args, launches.dispatch.num_blocks, kTwoLevelDispatchThreads / dev::kWarpSize);
  if (!dispatches.empty()) {
    const bool is_cached = dispatches.front().dispatch.mode == DispatchMode::kCached;
    launch_ranks(is_cached ? two_level_dispatch_cached_kernel_of_ranks : two_level_dispatch_kernel_of_ranks,
                 launches.dispatch, launches, kTwoLevelDispatchThreads, shared_bytes(dispatches.front()),
                 stream);
  }
  if (!launches.combine.ranks.empty())
    launch_ranks(two_level_combine_kernel_of_ranks, launches.combine, launches, kCombineThreads,
                 shared_of(launches.combine.ranks.front()).bytes(), stream);
}

}  // namespace deepep::virtual_ranks
