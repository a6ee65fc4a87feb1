// The host's side of the low-latency kernels in two levels: as low_latency_far/launch.hpp, whose blocks they
// have.
#pragma once

#include "kernels/low_latency/share.hpp"
#include "kernels/low_latency_rails/args.hpp"

namespace deepep::kernels {

/// There are launches of both halves alone.
void launch_low_latency(const RailDispatchArgs& args, int num_blocks, Halves halves, void* stream);
void launch_low_latency(const RailCombineArgs& args, int num_blocks, Halves halves, void* stream);
void load_low_latency_rails();

}  // namespace deepep::kernels
