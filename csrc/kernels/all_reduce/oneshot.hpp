// All-reduce of few bytes, one round: everybody's addends to everybody, and every rank sums all of them. The
// bits are those of direct.hpp.
//
// Phases:
//   start               reads the epoch, and whether a call before has failed
//   push_whole          the block's part of the addends to each other rank
//   raise_addend_flags  behind them, one at each other rank
//   advance_epoch       when all blocks have read it
//   wait_addend_flags   the same block's of each other rank
//   sum_whole           what those blocks have pushed, unless one did not come; results into the tensor
//
// Why no message is overwritten too early: exchange/exchange.hpp has the reason.
#pragma once

#include "kernels/all_reduce/flags.hpp"
#include "kernels/all_reduce/sum.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void sum_whole(const AllReduceCall& call) {
  const AllReduceArgs& args = call.args;
  if (has_failed_in(layout::ReduceRound::kAddends)) return;
  const ReducePart part = whole_of(args);
  with_message(args, [&](auto message) {
    using Message = decltype(message);
    for_each_block(part, [&](int64_t i) {
      const int64_t element = element_of(part, i);
      const ReduceAddends<Message> addends{call, element, i * message_block_bytes<Message>()};
      store_elements(args, element, decode(message, encode_result(message, addends)));
    });
  });
}

DEEPEP_KERNEL(all_reduce_oneshot_kernel, AllReduceArgs, kReduceThreads) {
  using namespace dev;
  const AllReduceCall call = start(args);
  push_whole(call);
  sync_block();
  raise_addend_flags(call);
  advance_epoch(call);
  wait_addend_flags(call);
  sync_block();
  sum_whole(call);
}

}  // namespace deepep::kernels
