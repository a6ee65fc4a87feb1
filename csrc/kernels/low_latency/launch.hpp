// The host's side of the low-latency kernels: how much shared memory, which kernel; and the launch.
#pragma once

#include "kernels/low_latency/args.hpp"

namespace deepep::kernels {

/// Warps of a block.
[[nodiscard]] int low_latency_warps();
/// Throws std::runtime_error with CUDA's words if a launch is refused. `stream` is a cudaStream_t. A launch of
/// both halves has no more blocks than there are SMs: all must be resident together.
void launch_low_latency(const LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream);
void launch_low_latency(const LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream);
/// Loads the kernels of all halves onto the current device, before any runs.
void load_low_latency();

}  // namespace deepep::kernels
