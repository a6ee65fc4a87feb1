// Sums of a block's addends: in float32, ranks ascending, the first as it is; or in fixed point, in units that
// the largest magnitude of all of them gives.
#pragma once

#include "kernels/all_reduce/push.hpp"

namespace deepep::kernels {

/// Addends of a block, those of others as they have come, this rank's from its tensor.
template <class Message>
struct ReduceAddends {
  const AllReduceCall& call;
  int64_t element;  // this lane's first
  int64_t offset;   // of the block in a source's messages

  [[nodiscard]] DEEPEP_DEVICE Four of(int rank) const {
    const AllReduceArgs& args = call.args;
    const Message message{};
    if (rank == args.rank) return decode(message, encode_addend(message, args, element));
    const int64_t place = args.slots.messages(layout::ReduceRound::kAddends, call.epoch, rank);
    return decode(message, get_message(message, args.heap[args.rank] + place + offset));
  }
};

template <class Message>
[[nodiscard]] DEEPEP_DEVICE Four sum_in_order(const ReduceAddends<Message>& addends) {
  using namespace dev;
  const AllReduceArgs& args = addends.call.args;
  Four total = addends.of(0);
  DEEPEP_ROLLED
  for (int rank = 1; rank < args.num_ranks; ++rank) {
    const Four addend = addends.of(rank);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) total.v[i] = add_rounded(total.v[i], addend.v[i]);
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) total.v[i] = div_rounded(total.v[i], args.divisor);
  return total;
}

template <class Message>
[[nodiscard]] DEEPEP_DEVICE Four sum_in_fixed_point(const ReduceAddends<Message>& addends) {
  using namespace dev;
  const AllReduceArgs& args = addends.call.args;
  uint32_t largest = 0;
  DEEPEP_ROLLED
  for (int rank = 0; rank < args.num_ranks; ++rank) largest = largest_magnitude(addends.of(rank), largest);
  const layout::FixedPoint fixed{static_cast<uint8_t>(warp_largest(largest) >> 23), args.headroom};
  const bool is_finite = fixed.exponent != layout::kNotFinite;
  int32_t total[kLaneElements] = {};
  if (is_finite) {
    const float once = fixed.half_scale(), again = fixed.other_half_scale();
    DEEPEP_ROLLED
    for (int rank = 0; rank < args.num_ranks; ++rank) {
      const Four addend = addends.of(rank);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        total[i] += layout::nearest_integer(mul_rounded(mul_rounded(addend.v[i], once), again));
    }
  }
  const float once = is_finite ? fixed.half_unit() : layout::float_of(layout::kFloatNan);
  const float again = is_finite ? fixed.other_half_unit() : 1;
  Four result;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float value = mul_rounded(mul_rounded(static_cast<float>(total[i]), once), again);
    result.v[i] = div_rounded(value, args.divisor);
  }
  return result;
}

/// The result of a block as it travels to everybody.
template <class Message>
[[nodiscard]] DEEPEP_DEVICE Coded<Message> encode_result(Message message,
                                                         const ReduceAddends<Message>& addends) {
  const AllReduceArgs& args = addends.call.args;
  Four total;
  if constexpr (Message::kIsPlain) {
    total = args.is_fixed ? sum_in_fixed_point(addends) : sum_in_order(addends);
  } else {
    total = sum_in_order(addends);
  }
  return encode(message, total, args.is_nearest, args.result_key, dice_index(args, addends.element));
}

}  // namespace deepep::kernels
