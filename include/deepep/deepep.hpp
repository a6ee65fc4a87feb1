// deepep for C++: where tokens go, where their rows lie, and gradients in the formats of the wire. On the CPU;
// needs a C++20 compiler and the library `deepep` (CMake: deepep::deepep).
//
// Letters: R ranks, E experts, expert e on rank e / (E / R); T tokens of this rank, K top-k, -1 for no expert.
// Arrays are row-major. Every function raises std::invalid_argument, which names the argument, for sizes or
// values that do not fit.
//
// The rules beneath are `layout/*.hpp`: header-only, and in kernels as well (DEEPEP_HD), so that a kernel of
// your own agrees with dispatch and combine about every row. `layout/rules/*.hpp` has more of what runs here.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "layout/rules/gradients.hpp"
#include "layout/rules/layout.hpp"
#include "layout/rules/sizes.hpp"

namespace deepep {

/// num_experts, num_ranks, ranks_per_domain: experts on ranks, ranks on scale-up domains.
using host::Group;
/// fp8 (e4m3 with a scale per 128 elements), fp16 (likewise), bf16.
using host::GradientFormat;
/// Dice of stochastic rounding; kToNearest needs none.
using host::Rounding;
inline constexpr Rounding kToNearest{.is_nearest = true, .first_key = 0, .second_key = 0, .first_index = 0};

/// How many tokens of a rank go where.
struct DispatchLayout {
  std::vector<int32_t> tokens_per_rank;    // [R]
  std::vector<int32_t> tokens_per_domain;  // [R / ranks_per_domain]
  std::vector<int32_t> tokens_per_expert;  // [E]
  std::vector<uint8_t> is_token_in_rank;   // [T, R]: a token goes to a rank once, however many experts it has
};

/// Rows that ranks receive, by source rank and then by token.
struct ReceivedRows {
  std::vector<int64_t> first_rows;    // [R, R]: where source s begins at rank r, at s * R + r
  std::vector<int64_t> num_received;  // [R]
};

namespace detail {

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace detail

/// topk_idx [T, K], int32_t or int64_t.
template <class Index>
[[nodiscard]] DispatchLayout dispatch_layout(std::span<const Index> topk_idx, int64_t num_topk,
                                             const Group& group) {
  const int64_t num_domains = host::num_domains(group);
  const auto size = static_cast<int64_t>(topk_idx.size());
  detail::expect(num_topk > 0 && size % num_topk == 0, "topk_idx: not a multiple of num_topk");
  const int64_t num_tokens = size / num_topk;
  DispatchLayout made{.tokens_per_rank = std::vector<int32_t>(group.num_ranks),
                      .tokens_per_domain = std::vector<int32_t>(num_domains),
                      .tokens_per_expert = std::vector<int32_t>(group.num_experts),
                      .is_token_in_rank = std::vector<uint8_t>(num_tokens * group.num_ranks)};
  host::dispatch_layout<Index>({topk_idx.data(), num_tokens, num_topk}, group, made.tokens_per_rank.data(),
                               made.tokens_per_domain.data(), made.tokens_per_expert.data(),
                               made.is_token_in_rank.data());
  return made;
}

/// counts [R, R]: rows from rank s to rank r, at s * R + r; line s is rank s's tokens_per_rank.
[[nodiscard]] inline ReceivedRows received_rows(std::span<const int32_t> counts, int64_t num_ranks) {
  detail::expect(num_ranks > 0 && static_cast<int64_t>(counts.size()) == num_ranks * num_ranks,
                 "counts: not num_ranks * num_ranks entries");
  ReceivedRows made{.first_rows = std::vector<int64_t>(counts.size()),
                    .num_received = std::vector<int64_t>(num_ranks)};
  host::first_rows({counts.data(), num_ranks, num_ranks}, made.first_rows.data(), made.num_received.data());
  return made;
}

/// [T, R]: the row of each token at each rank, or -1. first_rows [R]: this rank's line of `ReceivedRows`.
[[nodiscard]] inline std::vector<int64_t> send_rows(const DispatchLayout& layout,
                                                    std::span<const int64_t> first_rows) {
  const auto num_ranks = static_cast<int64_t>(layout.tokens_per_rank.size());
  detail::expect(num_ranks > 0 && layout.is_token_in_rank.size() % layout.tokens_per_rank.size() == 0,
                 "layout: is_token_in_rank has no multiple of num_ranks entries");
  detail::expect(static_cast<int64_t>(first_rows.size()) == num_ranks, "first_rows: not num_ranks entries");
  const auto num_tokens = static_cast<int64_t>(layout.is_token_in_rank.size()) / num_ranks;
  std::vector<int64_t> rows(layout.is_token_in_rank.size());
  host::send_rows({layout.is_token_in_rank.data(), num_tokens, num_ranks}, first_rows.data(), 1, rows.data());
  return rows;
}

/// The message of these values: codes, then a scale byte per 128 elements where the format has them.
[[nodiscard]] inline std::vector<uint8_t> encode_gradients(GradientFormat format, std::span<const float> values,
                                                           Rounding rounding = kToNearest) {
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint8_t> message(host::message_bytes(format, count));
  host::encode(format, values.data(), count, rounding, message.data());
  return message;
}

/// Writes a message's values, or adds them.
inline void decode_gradients(GradientFormat format, std::span<const uint8_t> message, std::span<float> values,
                             bool is_added = false) {
  const auto count = static_cast<int64_t>(values.size());
  detail::expect(static_cast<int64_t>(message.size()) == host::message_bytes(format, count),
                 "message: not the bytes of so many values");
  host::decode(format, message.data(), count, is_added, values.data());
}

}  // namespace deepep
