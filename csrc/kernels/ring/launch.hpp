// The host's side of a ring's kernels.
#pragma once

#include "kernels/ring/args.hpp"

namespace deepep::kernels {

/// A kernel each.
enum class RingStep { kBeforeSend, kBehindSend, kBeforeReceive, kBehindReceive };

/// Loads the kernels onto the current device, before any runs: a first launch might else wait for a kernel that
/// waits for a neighbour.
void load_ring();
/// Throws std::runtime_error with CUDA's words if the launch is refused.
void launch_ring(const RingArgs& args, RingStep step, void* stream);

}  // namespace deepep::kernels
