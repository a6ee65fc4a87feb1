// Checked launches, for the .cu files.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace deepep::kernels {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status));
}

template <class Args>
using Kernel = void (*)(Args);

/// Loads a kernel onto the current device: at its first launch that might have to wait for kernels which run.
template <class Args>
void load(Kernel<Args> kernel, const char* name) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
}

/// Lets launches of a kernel on the current device take so much dynamic shared memory; without it, 48 KiB.
template <class Args>
void allow_shared(Kernel<Args> kernel, int64_t bytes, const char* name) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}

/// Launches `kernel(args)`, which may take so much dynamic shared memory.
template <class Args>
void launch_allowed(Kernel<Args> kernel, const Args& args, int num_blocks, int threads, int64_t shared_bytes,
                    void* stream, const char* name) {
  kernel<<<num_blocks, threads, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), name);
}

/// Launches `kernel(args)`; raises its dynamic shared memory limit when it needs more than the default 48 KiB.
template <class Args>
void launch(Kernel<Args> kernel, const Args& args, int num_blocks, int threads, int64_t shared_bytes,
            void* stream, const char* name) {
  if (shared_bytes > 48 * 1024) allow_shared(kernel, shared_bytes, name);
  launch_allowed(kernel, args, num_blocks, threads, shared_bytes, stream, name);
}

}  // namespace deepep::kernels
