// The host's side of the bare exchange.
#pragma once

#include "kernels/exchange/args.hpp"

namespace deepep::kernels {

/// Loads the kernels onto the current device, before any runs: a first launch might else wait for a peer's
/// kernel, which waits for it.
void load_exchange();
/// Throws std::runtime_error with CUDA's words if the launch is refused. The blocks of all ranks are as many.
void launch_exchange(const ExchangeArgs& args, int num_blocks, void* stream);

}  // namespace deepep::kernels
