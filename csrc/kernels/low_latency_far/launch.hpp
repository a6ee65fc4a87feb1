// The host's side of the low-latency kernels between domains: as low_latency/launch.hpp.
#pragma once

#include "kernels/low_latency/share.hpp"
#include "kernels/low_latency_far/args.hpp"

namespace deepep::kernels {

void launch_low_latency(const FarDispatchArgs& args, int num_blocks, Halves halves, void* stream);
void launch_low_latency(const FarCombineArgs& args, int num_blocks, Halves halves, void* stream);
[[nodiscard]] BlockSize load_far_low_latency();

}  // namespace deepep::kernels
