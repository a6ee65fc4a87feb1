// The host's side of all-reduces over symmetric memory.
#pragma once

#include "kernels/all_reduce/args.hpp"

namespace deepep::kernels {

/// Loads the kernels onto the current device, before any runs: a first launch might else wait for a peer's
/// kernel, which waits for it.
void load_all_reduce();
/// Throws std::runtime_error with CUDA's words if the launch is refused. The blocks of all ranks are as many,
/// and the ranks choose the same of the two. is_oneshot: oneshot.hpp, whose messages a pair's room holds whole.
void launch_all_reduce(const AllReduceArgs& args, bool is_oneshot, int num_blocks, void* stream);

}  // namespace deepep::kernels
