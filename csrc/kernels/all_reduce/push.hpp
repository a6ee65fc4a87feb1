// Phases push_whole and push_parts: this rank's addends, each block of them encoded once, to those who sum
// them.
#pragma once

#include "kernels/all_reduce/call.hpp"

namespace deepep::kernels {

/// A block of this rank's addends as it travels, and as everybody adds it.
template <class Message>
[[nodiscard]] DEEPEP_DEVICE Coded<Message> encode_addend(Message message, const AllReduceArgs& args,
                                                         int64_t element) {
  return encode(message, load_elements(args, element), args.is_nearest, args.addend_key,
                dice_index(args, element));
}

/// Everything to everybody.
DEEPEP_DEVICE void push_whole(const AllReduceCall& call) {
  const AllReduceArgs& args = call.args;
  if (has_failed_before(layout::ReduceRound::kAddends)) return;
  const ReducePart part = whole_of(args);
  const int64_t place = args.slots.messages(layout::ReduceRound::kAddends, call.epoch, args.rank);
  with_message(args, [&](auto message) {
    for_each_block(part, [&](int64_t i) {
      const auto coded = encode_addend(message, args, element_of(part, i));
      const int64_t offset = i * message_block_bytes<decltype(message)>();
      DEEPEP_ROLLED
      for (int k = 1; k < args.num_ranks; ++k)
        put_message(message, args.heap[rank_after(args, k)] + place + offset, coded);
    });
  });
}

/// To every owner its part.
DEEPEP_DEVICE void push_parts(const AllReduceCall& call) {
  const AllReduceArgs& args = call.args;
  if (has_failed_before(layout::ReduceRound::kAddends)) return;
  const int64_t place = args.slots.messages(layout::ReduceRound::kAddends, call.epoch, args.rank);
  with_message(args, [&](auto message) {
    DEEPEP_ROLLED
    for (int k = 1; k < args.num_ranks; ++k) {
      const int owner = rank_after(args, k);
      const ReducePart part = part_of(args, owner);
      for_each_block(part, [&](int64_t i) {
        put_message(message, args.heap[owner] + place + i * message_block_bytes<decltype(message)>(),
                    encode_addend(message, args, element_of(part, i)));
      });
    }
  });
}

}  // namespace deepep::kernels
