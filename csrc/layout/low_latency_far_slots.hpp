// Where things lie in a rank's memory that its NIC reads and writes, for low-latency calls between domains. The
// *far* ranks are those of other domains, numbered from 0 by rank; each has a stretch here in which what it
// puts arrives, and one from which it is put to. Laid out alike on all ranks, so that a put's target follows
// from the number that the peer gives to this rank.
//
// All of it twice, by turns: docs/low_latency.md says why that is enough, on either side.
#pragma once

#include "layout/low_latency_slots.hpp"

namespace deepep::layout {

/// What a rank puts to another one: once in every call, each with a signal of its own.
enum class FarPut : int {
  kMessages,  // of a dispatch: its words, and the messages of the tokens that go there
  kDigests,   // of a combine: its digests, and the weights of those tokens
  kReturns,   // of a combine: whether all rows were made, and those of the tokens that came from there
};
inline constexpr int kFarPuts = 3;

/// The most ranks that are far from any: from one of the smallest domain, the last.
[[nodiscard]] DEEPEP_HD constexpr int max_far_ranks(const Placement& place) {
  return place.num_ranks - place.num_ranks_of_domain(place.num_domains() - 1);
}

/// Offsets. A stretch: what lies in it follows its begin. Made by the host.
struct LowLatencyFarSlots {
  LowLatencyFarSlots() = default;
  /// far_ranks: the most that any rank has. The others as of LowLatencySlots.
  DEEPEP_HD LowLatencyFarSlots(int far_ranks, int local_experts, int max_tokens, int max_topk,
                               int64_t max_row_bytes)
      : num_far_(far_ranks),
        messages_(align_up(8 * LowLatencyWords{max_tokens, local_experts}.count(), 16)),
        digests_(messages_ +
                 align_up(max_tokens * LowLatencyMessage{max_topk, max_row_bytes, 0}.bytes(), kLine)),
        returns_(align_up(weights() + int64_t{4} * max_tokens * max_topk, kLine)),
        stretch_(align_up(rows() + max_tokens * max_row_bytes, kLine)) {}

  /// A count of the puts of one kind that have come from a far rank in one of the two turns.
  [[nodiscard]] DEEPEP_HD int64_t signal(FarPut kind, int far, int64_t half) const {
    return far * kLine + 8 * (2 * static_cast<int>(kind) + half);
  }
  /// What is zero before the first call; the rest is read behind signals alone.
  [[nodiscard]] DEEPEP_HD int64_t control_bytes() const { return num_far_ * kLine; }
  /// The stretch in which a far rank's puts arrive,
  [[nodiscard]] DEEPEP_HD int64_t arriving(int far, int64_t half) const {
    return control_bytes() + (2 * far + half) * stretch_;
  }
  /// and that from which it is put to.
  [[nodiscard]] DEEPEP_HD int64_t leaving(int far, int64_t half) const {
    return arriving(num_far_ + far, half);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return arriving(2 * num_far_, 0); }

  /// Tagged words: LowLatencyWords. And behind them, so that one put carries both, messages side by side in the
  /// order of their tokens.
  [[nodiscard]] DEEPEP_HD static constexpr int64_t words() { return 0; }
  [[nodiscard]] DEEPEP_HD int64_t messages() const { return messages_; }
  /// Two tagged words, LowLatencyDigests; then float32 [tokens that go there, K].
  [[nodiscard]] DEEPEP_HD int64_t digests() const { return digests_; }
  [[nodiscard]] DEEPEP_HD int64_t weights() const { return digests_ + 8 * LowLatencyDigests::kCount; }
  /// uint32: the epoch, if all rows were made; then bf16 rows, in the order of their tokens.
  [[nodiscard]] DEEPEP_HD int64_t returns() const { return returns_; }
  [[nodiscard]] DEEPEP_HD int64_t rows() const { return returns_ + 16; }

  /// Puts of one rank to another that may be open at a time: those of two calls of either kind.
  [[nodiscard]] DEEPEP_HD static constexpr int max_open_puts() { return 2 * kFarPuts; }

 private:
  int num_far_;
  int64_t messages_;
  int64_t digests_;
  int64_t returns_;
  int64_t stretch_;
};

}  // namespace deepep::layout
