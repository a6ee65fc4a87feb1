// The bare exchange, phases raise_flags and wait_flags: a block has one at each other rank, and waits for the
// same block's of each.
#pragma once

#include "kernels/exchange/call.hpp"

namespace deepep::kernels {

/// Behind a block barrier that follows the block's stores.
DEEPEP_DEVICE void raise_flags(const ExchangeCall& call) {
  using namespace dev;
  const ExchangeArgs& args = call.args;
  const int peer = thread();
  if (peer >= args.num_ranks || peer == args.rank) return;
  auto* flag = reinterpret_cast<uint32_t*>(args.heap[peer] + args.slots.flag(args.rank, block()));
  store<release, sys_scope>(flag, call.epoch);
}

/// A rank that does not come in time is noted, and nobody reads its rows. A block barrier has to follow.
DEEPEP_DEVICE void wait_flags(const ExchangeCall& call) {
  using namespace dev;
  const ExchangeArgs& args = call.args;
  const int source = thread();
  if (source >= args.num_ranks || source == args.rank) return;
  const auto* flag =
      reinterpret_cast<const uint32_t*>(args.heap[args.rank] + args.slots.flag(source, block()));
  // A peer may have been through and be in the next exchange already.
  if (wait_reached<acquire, sys_scope>(flag, call.epoch, call.deadline)) return;
  fetch_or<relaxed, gpu_scope>(&args.state->missing, 1u << source);
  SharedArray<uint32_t>(0).bit_or(0, 1u);
}

}  // namespace deepep::kernels
