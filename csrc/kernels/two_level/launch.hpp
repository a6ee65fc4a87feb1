// The host's side of the two-level kernels: how much shared memory, which kernel; and the launch.
#pragma once

#include "kernels/two_level/args.hpp"

namespace deepep::kernels {

/// Throws std::runtime_error with CUDA's words if a launch is refused. `stream` is a cudaStream_t.
void launch_two_level(const TwoLevelPrefixArgs& args, void* stream);
void launch_two_level(const TwoLevelDispatchArgs& args, int num_blocks, void* stream);
void launch_two_level(const TwoLevelCombineArgs& args, int num_blocks, void* stream);
/// Loads the kernels onto the current device, before any runs.
void load_two_level();

}  // namespace deepep::kernels
