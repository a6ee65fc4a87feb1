// The bare exchange: given bytes to every other rank, a flag a block, and a wait for the peers' flags. It knows
// everything beforehand, so no dispatch that sends as many bytes can be faster: a floor to measure against.
// exchange_read.hpp is that of a combine.
//
// Phases:
//   start          reads the epoch
//   push_rows      the block's part of the rows to each other rank
//   raise_flags    behind them, one at each other rank
//   advance_epoch  when all blocks have read it
//   wait_flags     the same block's of each other rank
//
// Why no row is overwritten too early: rows lie in two places in turn. Who pushes with epoch e + 2 has waited
// for the receiver's flags of e + 1, raised in a kernel that began when its kernel of e had ended.
#pragma once

#include "kernels/exchange/flags.hpp"
#include "kernels/exchange/push.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(exchange_kernel, ExchangeArgs, kThreads) {
  using namespace dev;
  const ExchangeCall call = start(args);
  push_rows(call);
  sync_block();
  raise_flags(call);
  advance_epoch(call);
  wait_flags(call);
}

}  // namespace deepep::kernels
