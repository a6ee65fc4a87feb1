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

/// Facts of a kernel's code for the current device, which they load onto it.
template <class Args>
[[nodiscard]] cudaFuncAttributes attributes_of(Kernel<Args> kernel, const char* name) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes;
}

/// Loads a kernel onto the current device: at its first launch that might have to wait for kernels which run.
template <class Args>
void load(Kernel<Args> kernel, const char* name) {
  static_cast<void>(attributes_of(kernel, name));
}

/// Whether the code that runs here was compiled with bulk copies (device/device.hpp): code for an older GPU may
/// have been compiled again, by the driver, for this one.
template <class Args>
[[nodiscard]] bool has_bulk_copies(Kernel<Args> kernel, const char* name) {
  return attributes_of(kernel, name).ptxVersion >= 90;
}

/// The most dynamic shared memory that a block may be allowed on the current device.
[[nodiscard]] inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

/// Lets launches of a kernel on the current device take so much dynamic shared memory; without it, 48 KiB.
template <class Args>
void allow_shared(Kernel<Args> kernel, int64_t bytes, const char* name) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}

/// Loads a kernel, and lets its launches take all the dynamic shared memory that there is: said once, not at
/// each launch.
template <class Args>
void load_for_shared(Kernel<Args> kernel, const char* name) {
  const auto own = static_cast<int64_t>(attributes_of(kernel, name).sharedSizeBytes);
  allow_shared(kernel, most_shared_bytes() - own, name);
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
