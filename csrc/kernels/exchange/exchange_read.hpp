// The bare exchange of exchange.hpp, and then the rows that came are read: what no combine can do without.
//
// Phases:
//   start          reads the epoch
//   push_rows      the block's part of the rows to each other rank
//   raise_flags    behind them, one at each other rank
//   advance_epoch  when all blocks have read it
//   wait_flags     the same block's of each other rank
//   read_rows      what those blocks have pushed, unless one did not come
#pragma once

#include "kernels/exchange/flags.hpp"
#include "kernels/exchange/push.hpp"
#include "kernels/exchange/read.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(exchange_read_kernel, ExchangeArgs, kThreads) {
  using namespace dev;
  const ExchangeCall call = start(args);
  push_rows(call);
  sync_block();
  raise_flags(call);
  advance_epoch(call);
  wait_flags(call);
  sync_block();
  read_rows(call);
}

}  // namespace deepep::kernels
