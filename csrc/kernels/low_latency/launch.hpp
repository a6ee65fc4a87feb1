// The host's side of the low-latency kernels: how much shared memory, which kernel; and the launch.
#pragma once

#include "kernels/common/steps.hpp"
#include "kernels/low_latency/share.hpp"

namespace deepep::kernels {

/// Throws std::runtime_error with CUDA's words if a launch is refused. `stream` is a cudaStream_t. A launch of
/// both halves has no more blocks than there are SMs: all must be resident together. `lines`: where warps write
/// their time lines, of a call that `records` (args.hpp).
void launch_low_latency(const LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream,
                        const Lines& lines);
void launch_low_latency(const LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream,
                        const Lines& lines);
/// Loads the kernels of all halves onto the current device, before any runs, and says what their blocks have
/// there: that depends on the GPU, and on which code of the binary its driver has chosen.
[[nodiscard]] BlockSize load_low_latency();

}  // namespace deepep::kernels
