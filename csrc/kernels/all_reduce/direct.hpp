// All-reduce in two rounds: addends to their part's owner, who sums them; results to everybody, as the bytes
// that the owner has rounded, so that all ranks have the same bits.
//
// Phases:
//   start               reads the epoch, and whether a call before has failed
//   push_parts          the block's part of each owner's addends
//   raise_addend_flags  behind them, one at each other rank
//   advance_epoch       when all blocks have read it
//   wait_addend_flags   the same block's of each other rank
//   sum_part            this rank's part, unless one did not come; results into the tensor and to the others
//   raise_result_flags  behind them, unless one did not come
//   wait_result_flags   the same block's of each other rank
//   take_results        of the others' parts, into the tensor
//
// Why no message is overwritten too early: messages of a round lie in two places in turn. Who pushes with
// epoch e + 2 has waited for flags that the receiver has raised in its kernel of e + 1, which began when its
// kernel of e had ended.
#pragma once

#include "kernels/all_reduce/flags.hpp"
#include "kernels/all_reduce/sum.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void sum_part(const AllReduceCall& call) {
  const AllReduceArgs& args = call.args;
  if (has_failed_in(layout::ReduceRound::kAddends)) return;
  const ReducePart part = part_of(args, args.rank);
  const int64_t place = args.slots.messages(layout::ReduceRound::kResults, call.epoch, args.rank);
  with_message(args, [&](auto message) {
    using Message = decltype(message);
    for_each_block(part, [&](int64_t i) {
      const int64_t element = element_of(part, i), offset = i * message_block_bytes<Message>();
      const auto coded = encode_result(message, ReduceAddends<Message>{call, element, offset});
      DEEPEP_ROLLED
      for (int k = 1; k < args.num_ranks; ++k)
        put_message(message, args.heap[rank_after(args, k)] + place + offset, coded);
      store_elements(args, element, decode(message, coded));
    });
  });
}

DEEPEP_DEVICE void take_results(const AllReduceCall& call) {
  const AllReduceArgs& args = call.args;
  if (has_failed_in(layout::ReduceRound::kResults)) return;
  with_message(args, [&](auto message) {
    using Message = decltype(message);
    DEEPEP_ROLLED
    for (int k = 1; k < args.num_ranks; ++k) {
      const int owner = rank_after(args, k);
      const ReducePart part = part_of(args, owner);
      const int64_t place = args.slots.messages(layout::ReduceRound::kResults, call.epoch, owner);
      for_each_block(part, [&](int64_t i) {
        const auto coded =
            get_message(message, args.heap[args.rank] + place + i * message_block_bytes<Message>());
        store_elements(args, element_of(part, i), decode(message, coded));
      });
    }
  });
}

DEEPEP_KERNEL(all_reduce_direct_kernel, AllReduceArgs, kReduceThreads) {
  using namespace dev;
  const AllReduceCall call = start(args);
  push_parts(call);
  sync_block();
  raise_addend_flags(call);
  advance_epoch(call);
  wait_addend_flags(call);
  sync_block();
  sum_part(call);
  sync_block();
  raise_result_flags(call);
  wait_result_flags(call);
  sync_block();
  take_results(call);
}

}  // namespace deepep::kernels
