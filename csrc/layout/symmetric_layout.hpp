// Layout of a rank's symmetric heap, and of the arrays in which a dispatch receives.
//
// Every rank's heap is laid out alike: the control area first, the combine staging after it, the rest is a pool
// of receive arrays. Offsets are bytes from the heap's base unless a name says otherwise.
#pragma once

#include <cstdint>

#include "layout/rows.hpp"

namespace deepep::layout {

/// Ranks of one NVLink domain: one warp's lanes hold one rank each, and masks are 32 bits.
inline constexpr int kMaxRanks = 32;
inline constexpr int64_t kLine = 128;

/// The arrays in which a rank receives a dispatch, of `capacity` rows each, at places of their own in its heap.
enum SlotArray : int {
  kSlotRows,     // [capacity, row bytes]
  kSlotSource,   // int32 [capacity]: the token of its rank that a row is
  kSlotScales,   // 4 bytes [capacity, scales]
  kSlotIndices,  // int32 or int64 [capacity, K]: local expert or -1
  kSlotWeights,  // float32 [capacity, K]
  kSlotPlaces,   // int32 [capacity, K]: of a dispatch that spreads rows, an entry's place among its expert's
  kSlotArrays
};

/// Word numbers inside a mailbox.
struct MailboxWords {
  int num_ranks;

  /// Rows the source sends to rank `r`. Every rank gets the source's whole row, so each can sum any column.
  [[nodiscard]] DEEPEP_HD int count(int r) const { return r; }
  /// The place at which the source receives: offsets in its heap, in units of 16 bytes; 0: it does not want
  /// that array.
  [[nodiscard]] DEEPEP_HD int slot(int array) const { return num_ranks + array; }
  /// Rows the arrays have room for.
  [[nodiscard]] DEEPEP_HD int capacity() const { return slot(kSlotArrays); }
  /// The number of the source's blocks that will report in rows_done.
  [[nodiscard]] DEEPEP_HD int push_blocks() const { return capacity() + 1; }
  /// The most tokens of one of the source's streams (ControlLayout::stream); 0 where rows are not spread.
  [[nodiscard]] DEEPEP_HD int stream_tokens() const { return capacity() + 2; }
  /// A digest of what all ranks must pass alike (row bytes, top-k, scales, index width).
  [[nodiscard]] DEEPEP_HD int digest() const { return capacity() + 3; }
  /// Top-k entries of the source that point at the receiver's local expert `l`.
  [[nodiscard]] DEEPEP_HD int expert_count(int l) const { return capacity() + 4 + l; }
  /// Words from slot(0) to digest(): the same for all receivers.
  static constexpr int kCommon = kSlotArrays + 4;
};

/// A stream's words, 8 bytes each and tagged: the rows that one warp of a source's push block sends here.
enum StreamWord : int {
  kStreamBegin,  // the first of its rows
  kStreamCount,  // how many follow each other from there
  kStreamNext,   // rows before this one are here
  kStreamWords
};
/// Push blocks of a dispatch that spreads rows, at most, and the warps of one.
inline constexpr int kMaxStreamBlocks = 32;
inline constexpr int kStreamWarps = 16;

/// The words ranks signal each other with. Each word has one writer: the rank its index names. Made by the
/// host: the places are worked out once, not by every warp of every kernel.
struct ControlLayout {
  int num_ranks;
  int max_local_experts;
  int max_blocks;

  ControlLayout() = default;
  DEEPEP_HD ControlLayout(int ranks, int local_experts, int blocks)
      : num_ranks(ranks),
        max_local_experts(local_experts),
        max_blocks(blocks),
        mailbox_bytes_(lines(8 * MailboxWords{ranks}.expert_count(local_experts))),
        rows_done_(2 * ranks * mailbox_bytes_),
        rows_done_bytes_(lines(4 * blocks)),
        staging_free_(rows_done_ + ranks * rows_done_bytes_),
        arrived_(staging_free_ + ranks * kLine32),
        digest_(arrived_ + ranks * kLine32),
        streams_(digest_ + 2 * ranks * kLine32),
        stream_bytes_(lines(8 * kStreamWords * kStreamWarps * min_of(blocks, kMaxStreamBlocks))) {}

  /// The metadata that source `s` posts to this rank before it sends: tagged 8-byte words, see MailboxWords.
  /// Two in turn: a peer may be done with one call and into the next while this rank's slower blocks still
  /// read; it cannot be two ahead.
  [[nodiscard]] DEEPEP_HD int64_t mailbox(int s, uint32_t epoch) const {
    return (2 * s + static_cast<int>(epoch & 1u)) * mailbox_bytes_;
  }
  [[nodiscard]] DEEPEP_HD int64_t mailbox_bytes() const { return mailbox_bytes_; }
  /// Source `s`'s block `b` has written all its rows of the dispatch with this epoch: 4-byte words.
  [[nodiscard]] DEEPEP_HD int64_t rows_done(int s) const { return rows_done_ + s * rows_done_bytes_; }
  /// Owner `o` has consumed the staging of every combine up to this epoch: a 4-byte word.
  [[nodiscard]] DEEPEP_HD int64_t staging_free(int o) const { return staging_free_ + o * kLine32; }
  /// Rank `r` has entered the barrier with this epoch: a 4-byte word.
  [[nodiscard]] DEEPEP_HD int64_t arrived(int r) const { return arrived_ + r * kLine32; }
  /// The combine that source `s` has begun: a tagged 8-byte word, a digest of what all ranks must pass alike.
  /// Two in turn, as mailboxes.
  [[nodiscard]] DEEPEP_HD int64_t combine_digest(int s, uint32_t epoch) const {
    return digest_ + (2 * s + static_cast<int>(epoch & 1u)) * kLine32;
  }
  /// The combine in which source `s` gave up waiting for this rank's staging, so that its copy engine may have
  /// written there all the same: a 4-byte word, 0 if there is none. On the line of a digest, which is at hand
  /// by then.
  [[nodiscard]] DEEPEP_HD int64_t overwritten(int s) const { return combine_digest(s, 0) + 8; }
  /// Between domains, T of the combine that source `s` begins: a tagged 8-byte word, on the line of its digest.
  [[nodiscard]] DEEPEP_HD int64_t combine_tokens(int s, uint32_t epoch) const {
    return combine_digest(s, epoch) + 16;
  }
  /// The first of the words of source `s`'s warp `w` of push block `b`: see StreamWord.
  [[nodiscard]] DEEPEP_HD int64_t stream(int s, int b, int w) const {
    return streams_ + s * stream_bytes_ + 8 * kStreamWords * (b * kStreamWarps + w);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return streams_ + num_ranks * stream_bytes_; }

 private:
  static constexpr int kLine32 = static_cast<int>(kLine);

  [[nodiscard]] DEEPEP_HD static int lines(int bytes) { return static_cast<int>(align_up(bytes, kLine)); }

  int mailbox_bytes_;
  int rows_done_;
  int rows_done_bytes_;
  int staging_free_;
  int arrived_;
  int digest_;
  int streams_;
  int stream_bytes_;
};

/// The same arrays one after the other in one piece of memory: five arrays of `capacity` rows.
struct SlotLayout {
  int64_t capacity;
  int64_t row_bytes;
  int num_scales;
  int num_topk;
  int index_bytes;

  [[nodiscard]] DEEPEP_HD int64_t x() const { return 0; }
  /// Source token of each row: int32 [capacity].
  [[nodiscard]] DEEPEP_HD int64_t source() const { return align_up(capacity * row_bytes, kLine); }
  /// 4-byte scales, row-major [capacity, num_scales].
  [[nodiscard]] DEEPEP_HD int64_t scales() const { return source() + align_up(4 * capacity, kLine); }
  /// Local expert or -1: [capacity, num_topk] of index_bytes each.
  [[nodiscard]] DEEPEP_HD int64_t topk_idx() const {
    return scales() + align_up(4 * capacity * num_scales, kLine);
  }
  /// float32 [capacity, num_topk].
  [[nodiscard]] DEEPEP_HD int64_t topk_weights() const {
    return topk_idx() + align_up(capacity * num_topk * index_bytes, kLine);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const {
    return topk_weights() + align_up(4 * capacity * num_topk, kLine);
  }
};

/// Rows on their way back to their tokens' owner, with a flag for each part: flag == epoch says it is there.
/// Rows that follow each other lie one behind the other, and so do their weights. Made by the host, as the
/// places of the words.
struct StagingLayout {
  static constexpr int kParts = 4;

  StagingLayout() = default;
  /// row_bytes > 0. num_topk 0: no weights travel.
  DEEPEP_HD StagingLayout(int64_t area_bytes, int64_t row_bytes, int num_topk)
      : row_bytes_(row_bytes),
        weight_bytes_(4 * num_topk),
        // Flags sit first, at a place that does not depend on the row size, so that a flag is never overwritten
        // by a row of an operation with other shapes. Weights sit last.
        rows_begin_(align_up(4 * kParts * max_rows(area_bytes), kLine)),
        weights_begin_((area_bytes - max_rows(area_bytes) * weight_bytes_) & -kLine),
        capacity_(rows_begin_ > weights_begin_
                      ? 0
                      : min_of((weights_begin_ - rows_begin_) / row_bytes, max_rows(area_bytes))) {}

  /// 4 bytes.
  [[nodiscard]] DEEPEP_HD int64_t flag(int64_t row, uint32_t part) const { return 4 * (row * kParts + part); }
  [[nodiscard]] DEEPEP_HD int64_t rows_begin() const { return rows_begin_; }
  [[nodiscard]] DEEPEP_HD int64_t row(int64_t i) const { return rows_begin_ + i * row_bytes_; }
  [[nodiscard]] DEEPEP_HD int64_t weight_bytes() const { return weight_bytes_; }
  [[nodiscard]] DEEPEP_HD int64_t weights(int64_t row) const { return weights_begin_ + row * weight_bytes_; }
  [[nodiscard]] DEEPEP_HD int64_t capacity() const { return capacity_; }

 private:
  [[nodiscard]] DEEPEP_HD static int64_t max_rows(int64_t area_bytes) { return area_bytes / 1024; }

  int64_t row_bytes_;
  int64_t weight_bytes_;
  int64_t rows_begin_;
  int64_t weights_begin_;
  int64_t capacity_;
};

/// The cut of rows that travel and are summed: into 1 to StagingLayout::kParts parts. Parts of rows that follow
/// each other are items. Kernels divide by their number all the time, so that is done by a multiplication.
class Parts {
 public:
  DEEPEP_HD explicit Parts(uint32_t parts) : count(parts), inverse_((0x80000000u + parts - 1) / parts) {}

  uint32_t count;

  /// n / count, for n < 2^31: what is too much in the inverse is less than 1 / count by then.
  [[nodiscard]] DEEPEP_HD uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t{n} * inverse_) >> 31);
  }
  [[nodiscard]] DEEPEP_HD uint32_t row_of(uint32_t item) const { return divide(item); }
  [[nodiscard]] DEEPEP_HD uint32_t part_of(uint32_t item) const { return item - divide(item) * count; }
  /// First of a row's `pieces` in a part; part `count` would begin behind them all.
  [[nodiscard]] DEEPEP_HD int begin(int pieces, uint32_t part) const {
    return static_cast<int>(divide(static_cast<uint32_t>(pieces) * part));
  }
  [[nodiscard]] DEEPEP_HD bool is_last(uint32_t part) const { return part + 1 == count; }

 private:
  uint32_t inverse_;
};

/// First staging row, at `owner`, of the rows that come back from `from`. The owner's own rows do not travel.
template <class Count>
[[nodiscard]] DEEPEP_HD int64_t first_staging_row(const Count& count, int owner, int from) {
  int64_t row = 0;
  DEEPEP_ROLLED
  for (int r = 0; r < from; ++r) row += r == owner ? 0 : count(owner, r);
  return row;
}

/// Rows that go back to one owner together.
struct RowRange {
  int64_t row;    // the first, where they are
  int64_t place;  // the first, in the owner's staging
  int64_t rows;
};

/// The cut of rows into chunks that follow each other: each `shrink` percent of the one before.
struct ChunkSizes {
  static constexpr int kMaxChunks = 4;
  int num_chunks;
  int shrink;

  /// Rows of the chunks before the c-th.
  [[nodiscard]] DEEPEP_HD int64_t begin(int64_t rows, int c) const {
    int64_t before = 0, all = 0, size = 1000000;
    DEEPEP_ROLLED
    for (int i = 0; i < num_chunks; ++i, size = size * shrink / 100) {
      all += size;
      before += i < c ? size : 0;
    }
    return rows * before / all;
  }
};

/// The rows that `from` returns to `owner` in one of the chunks.
template <class Count>
[[nodiscard]] DEEPEP_HD RowRange chunk_of_rows(const Count& count, int owner, int from, int chunk,
                                               const ChunkSizes& chunks) {
  const int64_t rows = count(owner, from);
  const int64_t begin = chunks.begin(rows, chunk);
  return {first_row_of_source(count, owner, from) + begin, first_staging_row(count, owner, from) + begin,
          chunks.begin(rows, chunk + 1) - begin};
}

}  // namespace deepep::layout
