// Messages of an all-reduce: what a block of 128 elements looks like in symmetric memory. Codes lie lane by
// lane, then, in formats with scales, a word more whose lowest byte is the block's scale.
#pragma once

#include "kernels/all_reduce/elements.hpp"

namespace deepep::kernels {

/// Elements as they are: float32, and its upper half.
struct Float32Message {
  using Word = dev::Vec16;
  static constexpr bool kHasScale = false, kIsPlain = true;
};
struct Bfloat16Message {
  using Word = uint64_t;
  static constexpr bool kHasScale = false, kIsPlain = true;
};
/// A format of the codec. Word: a lane's codes.
template <class Format>
struct CodedMessage {
  using Word = std::conditional_t<sizeof(typename Format::Code) == 1, uint32_t, uint64_t>;
  static constexpr bool kHasScale = Format::kHasScale, kIsPlain = false;
};

template <class Message>
[[nodiscard]] DEEPEP_HD constexpr int64_t message_block_bytes() {
  return (dev::kWarpSize + Message::kHasScale) * static_cast<int64_t>(sizeof(typename Message::Word));
}

/// A lane's part of a block's message.
template <class Message>
struct Coded {
  typename Message::Word word;
  uint32_t scale;
};

/// Of values from the element of this index on. All lanes of a warp.
template <bool kNearest, class Format>
[[nodiscard]] DEEPEP_DEVICE Coded<CodedMessage<Format>> encode_with(CodedMessage<Format>, const Four& x,
                                                                    layout::RoundingKey key, uint32_t index) {
  using Word = typename CodedMessage<Format>::Word;
  constexpr int kBits = 8 * sizeof(typename Format::Code);
  Word word = 0;
  uint32_t scale = 0;
  float factor = 1;
  if constexpr (Format::kHasScale) {
    scale = layout::scale_of<Format>(warp_largest(largest_magnitude(x)));
    if (scale == layout::kNotFinite) return {0, scale};
    factor = layout::power_of_two(127 - static_cast<int>(scale));
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t dice = kNearest ? 0 : key.draw(index + static_cast<uint32_t>(i));
    uint32_t code = 0;
    if constexpr (Format::kHasScale) {
      code = layout::code_of<Format, kNearest>(dev::mul_rounded(x.v[i], factor), dice);
    } else {
      code = layout::bfloat_code<kNearest>(x.v[i], dice);
    }
    word |= Word{code} << (kBits * i);
  }
  return {word, scale};
}
template <class Format>
[[nodiscard]] DEEPEP_DEVICE Coded<CodedMessage<Format>> encode(CodedMessage<Format> message, const Four& x,
                                                               bool is_nearest, layout::RoundingKey key,
                                                               uint32_t index) {
  return is_nearest ? encode_with<true>(message, x, key, index) : encode_with<false>(message, x, key, index);
}
[[nodiscard]] DEEPEP_DEVICE Coded<Float32Message> encode(Float32Message, const Four& x, bool,
                                                         layout::RoundingKey, uint32_t) {
  Coded<Float32Message> coded{};
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) coded.word.w[i] = layout::bits_of(x.v[i]);
  return coded;
}
[[nodiscard]] DEEPEP_DEVICE Coded<Bfloat16Message> encode(Bfloat16Message, const Four& x, bool,
                                                          layout::RoundingKey, uint32_t) {
  Coded<Bfloat16Message> coded{};
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    coded.word |= uint64_t{layout::bfloat_code<true>(x.v[i], 0)} << (16 * i);
  return coded;
}

template <class Format>
[[nodiscard]] DEEPEP_DEVICE Four decode(CodedMessage<Format>, const Coded<CodedMessage<Format>>& coded) {
  constexpr int kBits = 8 * sizeof(typename Format::Code);
  float factor = 1;
  if constexpr (Format::kHasScale)
    factor = coded.scale == layout::kNotFinite ? layout::float_of(layout::kFloatNan)
                                               : layout::power_of_two(static_cast<int>(coded.scale) - 127);
  Four x;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const auto code = static_cast<uint32_t>(coded.word >> (kBits * i)) & ((1u << kBits) - 1);
    x.v[i] = layout::value_of<Format>(code);
    if constexpr (Format::kHasScale) x.v[i] = dev::mul_rounded(x.v[i], factor);
  }
  return x;
}
[[nodiscard]] DEEPEP_DEVICE Four decode(Float32Message, const Coded<Float32Message>& coded) {
  Four x;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) x.v[i] = layout::float_of(coded.word.w[i]);
  return x;
}
[[nodiscard]] DEEPEP_DEVICE Four decode(Bfloat16Message, const Coded<Bfloat16Message>& coded) {
  Four x;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    x.v[i] = layout::float_of(static_cast<uint32_t>(coded.word >> (16 * i)) << 16);
  return x;
}

/// The message of a block at `to`, by all lanes of a warp.
template <class Message>
DEEPEP_DEVICE void put_message(Message, std::byte* to, const Coded<Message>& coded) {
  using namespace dev;
  using Word = typename Message::Word;
  store(reinterpret_cast<Word*>(to) + lane(), coded.word);
  if constexpr (Message::kHasScale)
    if (lane() == 0) store(reinterpret_cast<Word*>(to) + kWarpSize, Word{coded.scale});
}
template <class Message>
[[nodiscard]] DEEPEP_DEVICE Coded<Message> get_message(Message, const std::byte* from) {
  using namespace dev;
  using Word = typename Message::Word;
  Coded<Message> coded{};
  coded.word = load(reinterpret_cast<const Word*>(from) + lane());
  if constexpr (Message::kHasScale)
    coded.scale = static_cast<uint32_t>(load(reinterpret_cast<const Word*>(from) + kWarpSize));
  return coded;
}

/// Calls `visit` with the call's kind of message.
template <class Visit>
DEEPEP_DEVICE void with_message(const AllReduceArgs& args, const Visit& visit) {
  switch (args.format) {
    case ReduceFormat::kFp8: return visit(CodedMessage<layout::E4M3>{});
    case ReduceFormat::kFp16: return visit(CodedMessage<layout::Half>{});
    case ReduceFormat::kBf16: return visit(CodedMessage<layout::Bfloat>{});
    case ReduceFormat::kPlain: break;
  }
  if (args.is_bf16) return visit(Bfloat16Message{});
  visit(Float32Message{});
}

}  // namespace deepep::kernels
