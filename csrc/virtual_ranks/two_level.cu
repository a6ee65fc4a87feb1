// The two-level kernels' source once more, as kernels of grids [blocks, ranks]: a row of blocks is a rank.
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

/// Kernel: void (*)(const Args*).
template <class Args, class Kernel>
void launch_ranks(Kernel kernel, Gathered<Args>& gathered, int threads, int64_t shared_bytes, void* on) {
  if (gathered.ranks.empty()) return;
  auto* stream = static_cast<cudaStream_t>(on);
  const size_t bytes = gathered.ranks.size() * sizeof(Args);
  void* ranks = nullptr;
  check(cudaMalloc(&ranks, bytes), "arguments of virtual ranks");
  check(cudaMemcpyAsync(ranks, gathered.ranks.data(), bytes, cudaMemcpyHostToDevice, stream), "arguments");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "shared memory");
  const dim3 grid(static_cast<unsigned>(gathered.num_blocks), static_cast<unsigned>(gathered.ranks.size()));
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(
      static_cast<const Args*>(ranks));
  check(cudaGetLastError(), "virtual ranks");
  check(cudaStreamSynchronize(stream), "virtual ranks");
  check(cudaFree(ranks), "cudaFree");
  gathered = {};
}

}  // namespace

void load_kernels() {
  load(two_level_prefix_kernel_of_ranks, "two_level_prefix");
  load(two_level_dispatch_kernel_of_ranks, "two_level_dispatch");
  load(two_level_dispatch_cached_kernel_of_ranks, "two_level_dispatch_cached");
  load(two_level_combine_kernel_of_ranks, "two_level_combine");
}

void launch(Launches& launches, void* stream) {
  launch_ranks(two_level_prefix_kernel_of_ranks, launches.prefix, kThreads, 16, stream);
  auto& dispatches = launches.dispatch.ranks;
  for (TwoLevelDispatchArgs& args : dispatches)
    prepare(args, launches.dispatch.num_blocks, kTwoLevelDispatchThreads / dev::kWarpSize);
  if (!dispatches.empty()) {
    const bool is_cached = dispatches.front().dispatch.mode == DispatchMode::kCached;
    launch_ranks(is_cached ? two_level_dispatch_cached_kernel_of_ranks : two_level_dispatch_kernel_of_ranks,
                 launches.dispatch, kTwoLevelDispatchThreads, shared_bytes(dispatches.front()), stream);
  }
  if (!launches.combine.ranks.empty())
    launch_ranks(two_level_combine_kernel_of_ranks, launches.combine, kCombineThreads,
                 shared_of(launches.combine.ranks.front()).bytes(), stream);
}

}  // namespace deepep::virtual_ranks
