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

/// A row in LogFMT that a put carries, all in words of four bytes: what LogFMT says of its groups; for each
/// unit of 512 channels, which of the *rests* behind all rows it has, if it goes as it is; then ten bits of
/// each channel's sixteen. So what goes encoded takes its ten sixteenths, and all rows' places are known.
struct FarLogfmtRow {
  int hidden;  // a multiple of kLogfmtGroup

  static constexpr int kUnit = 4 * kLogfmtGroup;
  static constexpr int kUnitBytes = kUnit * 10 / 8;

  [[nodiscard]] DEEPEP_HD constexpr int64_t groups() const { return hidden / kLogfmtGroup; }
  [[nodiscard]] DEEPEP_HD constexpr int64_t units() const { return ceil_div(hidden, kUnit); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t rest_of(int64_t unit) const { return 4 * (groups() + unit); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t codes() const { return rest_of(units()); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t bytes() const {
    const int64_t last = hidden % kUnit / 8;  // pieces of eight channels, of which 32 have three words
    return codes() + hidden / kUnit * kUnitBytes +
           4 * (3 * min_of(last, int64_t{32}) + 2 * max_of(last - 32, int64_t{0}));
  }
  /// Pieces of the first unit: those of 32 lanes, one each, and those of lanes that have a second.
  [[nodiscard]] DEEPEP_HD constexpr int first_pieces() const { return min_of(hidden / 8, 32); }
  [[nodiscard]] DEEPEP_HD constexpr int second_pieces() const {
    return min_of(max_of(hidden / 8 - 32, 0), 32);
  }
  /// A rest: the fourth word of each first piece, the third and the fourth of each second.
  [[nodiscard]] DEEPEP_HD constexpr int64_t rest_bytes() const {
    return 4 * first_pieces() + 8 * second_pieces();
  }
  /// With all its rests.
  [[nodiscard]] DEEPEP_HD constexpr int64_t most_bytes() const { return bytes() + units() * rest_bytes(); }
};

/// Offsets. A stretch: what lies in it follows its begin. Made by the host.
struct LowLatencyFarSlots {
  LowLatencyFarSlots() = default;
  /// far_ranks: the most that any rank has. rows_of_token: that go back of a token, K in the exact mode.
  /// word_sets: that a dispatch puts, in two levels one for each rank of a domain. The others as of
  /// LowLatencySlots.
  DEEPEP_HD LowLatencyFarSlots(int far_ranks, int local_experts, int max_tokens, int max_topk,
                               int64_t max_row_bytes, int rows_of_token = 1, int word_sets = 1)
      : num_far_(far_ranks),
        messages_(align_up(8 * word_sets * LowLatencyWords{max_tokens, local_experts}.count(), 16)),
        digests_(messages_ +
                 align_up(max_tokens * LowLatencyMessage{max_topk, max_row_bytes, 0}.bytes(), kLine)),
        returns_(align_up(weights() + int64_t{4} * max_tokens * max_topk, kLine)),
        stretch_(align_up(rows() + int64_t{rows_of_token} * max_tokens * row_room(max_row_bytes), kLine)) {}

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
  /// uint32: the epoch, if all rows were made; then bf16 rows, or in LogFMT, in the order of their tokens.
  [[nodiscard]] DEEPEP_HD int64_t returns() const { return returns_; }
  [[nodiscard]] DEEPEP_HD int64_t rows() const { return returns_ + 16; }

  /// Puts of one rank to another that may be open at a time: those of two calls of either kind.
  [[nodiscard]] DEEPEP_HD static constexpr int max_open_puts() { return 2 * kFarPuts; }

 private:
  /// Of a row that goes back, in whatever form: as it is, or the longest in LogFMT.
  [[nodiscard]] DEEPEP_HD static constexpr int64_t row_room(int64_t max_row_bytes) {
    const FarLogfmtRow most{static_cast<int>(max_row_bytes / (2 * kLogfmtGroup)) * kLogfmtGroup};
    return max_of(align_up(most.most_bytes(), int64_t{16}), max_row_bytes);
  }

  int num_far_;
  int64_t messages_;
  int64_t digests_;
  int64_t returns_;
  int64_t stretch_;
};

}  // namespace deepep::layout
