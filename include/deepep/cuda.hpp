// deepep for C++ on GPUs: the kernels with raw pointers, sizes and streams. Needs CUDA and the library
// `deepep_cuda` (CMake: deepep::cuda).
//
// A Domain is one rank's view of its NVLink domain: it launches dispatch, combine and barrier
// (host/launches.hpp has their arguments). All ranks launch the same operations in the same order. Heaps are
// symmetric memory, mapped into this process: other processes' by CUDA IPC, or several ranks' of one GPU, whose
// blocks must then be resident together. No wait is without a deadline: a rank that misses one leaves a fault.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/cuda_launcher.hpp"
#include "host/domain.hpp"

namespace deepep::cuda {

using Domain = host::Domain<host::CudaLauncher>;
/// Arguments of dispatch and combine.
using host::Blocks;
using host::CombineLaunch;
using host::DispatchLaunch;

/// Throws std::runtime_error with CUDA's words.
inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// Memory of the current device, zeroed before the constructor returns; `pinned`: of the host, which kernels
/// write to.
class Memory {
 public:
  explicit Memory(int64_t bytes, bool pinned = false) : pinned_(pinned) {
    void* made = nullptr;
    const auto size = static_cast<size_t>(bytes);
    check(pinned ? cudaMallocHost(&made, size) : cudaMalloc(&made, size));
    bytes_ = static_cast<std::byte*>(made);
    cudaError_t zeroed = cudaMemset(bytes_, 0, size);
    // A kernel on a stream that does not wait for the default one would find what was there before.
    if (zeroed == cudaSuccess) zeroed = cudaStreamSynchronize(nullptr);
    if (zeroed != cudaSuccess) release();
    check(zeroed);
  }
  ~Memory() { release(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T = std::byte>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(bytes_);
  }

 private:
  void release() { pinned_ ? cudaFreeHost(bytes_) : cudaFree(bytes_); }

  bool pinned_;
  std::byte* bytes_ = nullptr;
};

/// Sizes of what a Domain keeps in a rank's heap; what is received lies behind them.
struct HeapOptions {
  int num_ranks = 0;
  int max_local_experts = 0;
  int max_blocks = 0;
  int64_t staging_bytes = 0;  // what rows return to in a combine

  /// Where the heap is the caller's: a multiple of 128.
  [[nodiscard]] int64_t receive_offset() const {
    const int64_t control = layout::ControlLayout{num_ranks, max_local_experts, max_blocks}.bytes();
    return layout::align_up(control + staging_bytes, 128);
  }
};

/// A Domain, and the words of its rank that are not in the heap.
class Rank {
 public:
  /// heaps [R]: every rank's, as mapped here, zeroed before any rank launches anything.
  Rank(int rank, std::vector<std::byte*> heaps, const HeapOptions& heap, double timeout_seconds)
      : state_(sizeof(kernels::LocalState)),
        fault_(sizeof(kernels::FaultRecord), true),
        domain_(host::DomainOptions{.rank = rank,
                                    .heaps = std::move(heaps),
                                    .max_local_experts = heap.max_local_experts,
                                    .max_blocks = heap.max_blocks,
                                    .staging_bytes = heap.staging_bytes,
                                    .state = state_.as<kernels::LocalState>(),
                                    .fault = fault_.as<kernels::FaultRecord>(),
                                    .timeout_seconds = timeout_seconds},
                std::make_shared<host::Turns>()) {}

  [[nodiscard]] Domain& domain() { return domain_; }

 private:
  Memory state_, fault_;
  Domain domain_;
};

}  // namespace deepep::cuda
