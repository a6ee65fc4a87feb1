// Where things lie in the symmetric memory of the low-latency operations. Every source has a stretch of its own
// in each rank's memory, at a place that depends on the buffer alone and not on a call's shapes: so a rank that
// writes late, when others have given it up, writes over nothing but what it wrote before.
//
// All of it twice, by the parity of the epoch (docs/low_latency.md says why that is enough).
#pragma once

#include "layout/placement.hpp"
#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// Channels that share a scale in the fused FP8 cast.
inline constexpr int kFp8Group = 128;

/// Channels of a LogFMT group.
inline constexpr int kLogfmtGroup = 128;

/// A token on its way to a rank: a header, its channels, its scales. A header has for each of the token's K
/// top-k entries where the row goes at that rank, then the weights.
struct LowLatencyMessage {
  int num_topk;
  int64_t row_bytes;  // of channels, as they travel: a multiple of 16
  int num_scales;     // float32; 0: none

  /// Words of a header.
  [[nodiscard]] DEEPEP_HD static constexpr int header_words(int num_topk) { return 2 * num_topk; }
  [[nodiscard]] DEEPEP_HD constexpr int64_t entry(int k) const { return 4 * k; }
  [[nodiscard]] DEEPEP_HD constexpr int64_t weight(int k) const { return 4 * (num_topk + k); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t row() const { return align_up(4 * header_words(num_topk), 16); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t scales() const { return row() + row_bytes; }
  [[nodiscard]] DEEPEP_HD constexpr int64_t bytes() const { return align_up(scales() + 4 * num_scales, 16); }
};

/// An entry of a header: the local expert and the number of the row among those that this source sends it;
/// behind the receiver's counts, the number among all rows of the expert. E <= 8192, R * M <= 32768.
inline constexpr uint32_t kNoEntry = 0xffffffffu;
/// On an entry of a header: one before it has the same row.
inline constexpr uint32_t kRepeated = 0x80000000u;
[[nodiscard]] DEEPEP_HD constexpr uint32_t pack_entry(int local_expert, int row) {
  return static_cast<uint32_t>(local_expert) << 16 | static_cast<uint32_t>(row);
}
[[nodiscard]] DEEPEP_HD constexpr int entry_expert(uint32_t entry) {
  return static_cast<int>((entry & ~kRepeated) >> 16);
}
[[nodiscard]] DEEPEP_HD constexpr int entry_row(uint32_t entry) { return static_cast<int>(entry & 0xffffu); }

/// Words of a dispatch, which come before rows: what must be the same everywhere; the source's tokens that come
/// here, as bits; its rows for each local expert. A source posts all words that the buffer has room for: a
/// receiver that expects another number of them finds the digest that says so, and waits for none in vain.
struct LowLatencyWords {
  int max_tokens;
  int num_local_experts;

  static constexpr int kDigest = 0;
  static constexpr int kTokens = 1;  // of the first 32 tokens
  [[nodiscard]] DEEPEP_HD constexpr int token_words() const { return (max_tokens + 31) / 32; }
  /// Of the first local expert.
  [[nodiscard]] DEEPEP_HD constexpr int rows() const { return kTokens + token_words(); }
  [[nodiscard]] DEEPEP_HD constexpr int count() const { return rows() + num_local_experts; }
};

/// Words of a combine: what must be the same everywhere, posted at its start; whether its top-k indices are the
/// dispatch's, which takes longer to find out.
struct LowLatencyDigests {
  static constexpr int kShapes = 0;
  static constexpr int kIndices = 1;
  static constexpr int kCount = 2;
};

/// One rank's memory: what `source` writes there. Made by the host.
struct LowLatencySlots {
  LowLatencySlots() = default;
  /// Sizes of the largest call: M tokens a rank, K top-k, rows of so many bytes in bf16 (FP8 with scales takes
  /// less). entry_stretches: 0 where a rank returns one row for each token. Else every top-k entry of a token
  /// has a row of its own: 1, there is one stretch of those for all sources, since an entry has one; R, one for
  /// each source, where a rank that was given up may still write when others go on in the same memory.
  DEEPEP_HD LowLatencySlots(int ranks, int local_experts, int max_tokens, int max_topk, int64_t max_row_bytes,
                            int entry_stretches = 0)
      : words_{max_tokens, local_experts},
        words_bytes_(align_up(8 * words_.count(), kLine)),
        flags_bytes_(align_up(4 * max_tokens, kLine)),
        weights_bytes_(align_up(int64_t{8} * max_tokens * max_topk, kLine)),
        messages_bytes_(align_up(max_tokens * LowLatencyMessage{max_topk, max_row_bytes, 0}.bytes(), kLine)),
        returns_bytes_(
            align_up((entry_stretches > 0 ? max_topk : 1) * max_tokens * max_row_bytes, kLine)),
        metadata_bytes_(align_up(
            (entry_stretches > 0 ? max_topk : 1) * max_tokens * metadata_of(max_row_bytes), kLine)),
        both_(2 * ranks),
        num_ranks_(ranks),
        num_returns_(entry_stretches > 0 ? entry_stretches : ranks) {}

  /// The words that a source posts.
  [[nodiscard]] DEEPEP_HD const LowLatencyWords& words() const { return words_; }
  /// Tagged words of `source`'s dispatch: LowLatencyWords.
  [[nodiscard]] DEEPEP_HD int64_t words(uint32_t epoch, int source) const {
    return number(epoch, source) * words_bytes_;
  }
  /// What `source` begins to combine: two tagged words, LowLatencyDigests.
  [[nodiscard]] DEEPEP_HD int64_t digests(uint32_t epoch, int source) const {
    return both_ * words_bytes_ + number(epoch, source) * kLine;
  }
  /// uint32 [M]: epoch of the dispatch whose message is there.
  [[nodiscard]] DEEPEP_HD int64_t message_flags(uint32_t epoch, int source) const {
    return both_ * (words_bytes_ + kLine) + number(epoch, source) * flags_bytes_;
  }
  /// uint32 [M]: epoch of the combine whose row is there.
  [[nodiscard]] DEEPEP_HD int64_t return_flags(uint32_t epoch, int source) const {
    return both_ * (words_bytes_ + kLine + flags_bytes_) + number(epoch, source) * flags_bytes_;
  }
  /// Tagged words [T, K]: weights of `source`'s tokens, where its dispatch did not carry them.
  [[nodiscard]] DEEPEP_HD int64_t weights(uint32_t epoch, int source) const {
    return both_ * (words_bytes_ + kLine + 2 * flags_bytes_) + number(epoch, source) * weights_bytes_;
  }
  /// A tagged word, once: which operation `source` is held up in, and how long (low_latency/patience.hpp).
  [[nodiscard]] DEEPEP_HD int64_t held(int source) const {
    return both_ * (words_bytes_ + kLine + 2 * flags_bytes_ + weights_bytes_) + source * kLine;
  }
  /// What is zero before the first call; the rest is read behind flags alone.
  [[nodiscard]] DEEPEP_HD int64_t control_bytes() const { return held(num_ranks_); }
  /// Messages of `source`'s dispatch, by token.
  [[nodiscard]] DEEPEP_HD int64_t messages(uint32_t epoch, int source) const {
    return control_bytes() + number(epoch, source) * messages_bytes_;
  }
  /// bf16 rows that `source` returns, by token.
  [[nodiscard]] DEEPEP_HD int64_t returns(uint32_t epoch, int source) const {
    return control_bytes() + both_ * messages_bytes_ + number(epoch, source) * returns_bytes_;
  }
  /// The same where each entry has a row: [T, K].
  [[nodiscard]] DEEPEP_HD int64_t entries(uint32_t epoch, int source) const {
    return control_bytes() + both_ * messages_bytes_ + stretch(epoch, source) * returns_bytes_;
  }
  /// Bytes of what LogFMT says of a bf16 row of so many: two of its values for each group.
  [[nodiscard]] DEEPEP_HD static constexpr int64_t metadata_of(int64_t row_bytes) {
    return row_bytes / (2 * kLogfmtGroup) * 4;
  }
  /// That of the rows that `source` returns, in their order.
  [[nodiscard]] DEEPEP_HD int64_t metadata(uint32_t epoch, int source) const {
    return control_bytes() + both_ * messages_bytes_ + 2 * num_returns_ * returns_bytes_ +
           stretch(epoch, source) * metadata_bytes_;
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return control_bytes() + both_ * messages_bytes_ + 2 * num_returns_ * (returns_bytes_ + metadata_bytes_);
  }

 private:
  [[nodiscard]] DEEPEP_HD int64_t number(uint32_t epoch, int source) const {
    return static_cast<int64_t>(epoch & 1u) * num_ranks_ + source;
  }
  [[nodiscard]] DEEPEP_HD int64_t stretch(uint32_t epoch, int source) const {
    return static_cast<int64_t>(epoch & 1u) * num_returns_ + (num_returns_ == 1 ? 0 : source);
  }

  LowLatencyWords words_;
  int64_t words_bytes_;
  int64_t flags_bytes_;
  int64_t weights_bytes_;
  int64_t messages_bytes_;
  int64_t returns_bytes_;
  int64_t metadata_bytes_;
  int64_t both_;
  int num_ranks_;
  int num_returns_;  // stretches of an epoch
};

}  // namespace deepep::layout
