// How rows cross between domains: in windows of tokens and chunks of records, through memory that does not grow
// with T. A rank sends to its rail peers, the ranks of the other domains with its local index: a dispatch its
// tokens, a combine its domain's sums. What goes from one rank to another is one sequence of windows over all
// calls; it uses the two halves of a buffer by turns, and all counting is by the window's number in it.
// docs/domains.md has the protocol.
// Templates over the integer: the host evaluates total_bytes() in 128 bits before anybody uses 64.
#pragma once

#include "layout/placement.hpp"

namespace deepep::layout {

/// Records of a chunk, which one put carries.
inline constexpr int32_t kChunkRecords = 16;
/// In front of a chunk's records: int32 records in this chunk, int32 records of the window.
inline constexpr int64_t kChunkHeader = 16;
inline constexpr int64_t kCrossingAlignment = 128;

/// The tokens of a call, so many at a time: those of one window share a half.
struct Windows {
  int64_t num_tokens;  // T, of the tokens' owner
  int64_t window;      // the same on all ranks, a multiple of kChunkRecords

  [[nodiscard]] DEEPEP_HD constexpr int64_t count() const { return ceil_div(num_tokens, window); }
  [[nodiscard]] DEEPEP_HD constexpr int64_t begin(int64_t w) const { return w * window; }
  [[nodiscard]] DEEPEP_HD constexpr int64_t end(int64_t w) const {
    return min_of(num_tokens, (w + 1) * window);
  }
};

/// A window by its number among all that went from one rank to another, from 0.
struct WindowTurn {
  int64_t number;

  [[nodiscard]] DEEPEP_HD constexpr int64_t half() const { return number % 2; }
  /// What the word of each of its chunks says once the chunk is here: every window signals all chunks of its
  /// half once, empty ones too.
  [[nodiscard]] DEEPEP_HD constexpr int64_t arrivals() const { return number / 2 + 1; }
  /// What the sender's credit for this half must say before it writes: so many windows before went through it,
  /// and the receiver adds one for each that it has read. Windows of one half are read one after the other;
  /// those of both, in any order.
  [[nodiscard]] DEEPEP_HD constexpr int64_t credit() const { return number / 2; }
};

/// Records that are packed by their position, whatever their tokens: the chunk that holds one. For the CPU
/// alone: kernels pack those of kChunkRecords tokens that follow each other.
[[nodiscard]] DEEPEP_HD constexpr int64_t chunk_of_record(int64_t position) { return position / kChunkRecords; }
/// The same: records in a chunk, of a window that has so many: the first chunks are full.
[[nodiscard]] DEEPEP_HD constexpr int64_t records_in_chunk(int64_t num_records, int64_t chunk) {
  return max_of(min_of(num_records - chunk * kChunkRecords, int64_t{kChunkRecords}), int64_t{0});
}

/// Windows as long as memory and latency of D domains like them: 896 tokens for two, 128 for eight.
[[nodiscard]] DEEPEP_HD constexpr int64_t default_window(int64_t num_domains) {
  const int64_t tokens = min_of(max_of(896 / max_of(num_domains - 1, int64_t{1}), int64_t{64}), int64_t{1024});
  return tokens / kChunkRecords * kChunkRecords;
}

/// A token on its way to a domain: its row, its scales; its number at its source, its final rows at the
/// domain's ranks (int32, -1 where it does not go); its top-k indices and weights.
template <class Int>
struct CrossingRecord {
  Int row_bytes;  // a multiple of 16
  Int num_scales;
  Int domain_ranks;  // P
  Int num_topk;      // 0: none travel

  [[nodiscard]] DEEPEP_HD constexpr Int scales() const { return row_bytes; }
  [[nodiscard]] DEEPEP_HD constexpr Int token() const { return scales() + 4 * num_scales; }
  [[nodiscard]] DEEPEP_HD constexpr Int final_row(Int local) const { return token() + 4 + 4 * local; }
  [[nodiscard]] DEEPEP_HD constexpr Int index(Int k) const { return final_row(domain_ranks) + 4 * k; }
  [[nodiscard]] DEEPEP_HD constexpr Int weight(Int k) const { return index(num_topk) + 4 * k; }
  [[nodiscard]] DEEPEP_HD constexpr Int bytes() const { return align_up(weight(num_topk), Int(16)); }
};

/// A domain's sum on its way to the token's owner, or one row on its way to the gateway.
template <class Int>
struct ReturnRecord {
  Int row_bytes;  // a multiple of 16
  Int num_topk;   // 0: no weights travel

  [[nodiscard]] DEEPEP_HD constexpr Int weight(Int k) const { return row_bytes + 4 * k; }
  [[nodiscard]] DEEPEP_HD constexpr Int bytes() const { return align_up(weight(num_topk), Int(16)); }
};

/// Peers are numbered 0 .. D-2 on every rank: the other domains, ascending.
[[nodiscard]] DEEPEP_HD constexpr int64_t peer_of_domain(int64_t domain, int64_t own) {
  return domain < own ? domain : domain - 1;
}
[[nodiscard]] DEEPEP_HD constexpr int64_t domain_of_peer(int64_t peer, int64_t own) {
  return peer < own ? peer : peer + 1;
}

/// One rank's memory for what crosses: what its NIC reads and writes (every method but the last two), and the
/// staging that its neighbours fill over NVLink. Every offset is from the start of its kind of memory.
template <class Int>
struct CrossingBuffer {
  Int num_domains;    // D, at least 2
  Int window;         // tokens, a multiple of kChunkRecords
  Int record_bytes;   // the larger of CrossingRecord's and ReturnRecord's
  Int return_bytes;   // of ReturnRecord
  Int copies;         // rows that a domain returns for a token at most: min(P, K), or P without top-k
  Int mailbox_words;  // 8 bytes each, that a source posts before it sends

  [[nodiscard]] DEEPEP_HD constexpr Int num_peers() const { return num_domains - 1; }
  [[nodiscard]] DEEPEP_HD constexpr Int num_chunks() const { return window / kChunkRecords; }
  [[nodiscard]] DEEPEP_HD constexpr Int chunk_bytes() const {
    return kChunkHeader + kChunkRecords * record_bytes;
  }

  // Words first, on lines of their own: each has one writer, the peer that its index names.

  /// What `peer` posts of the call with this parity, and the word that its put raises behind that.
  [[nodiscard]] DEEPEP_HD constexpr Int mailbox(Int peer, Int parity) const {
    return (2 * peer + parity) * mailbox_bytes();
  }
  [[nodiscard]] DEEPEP_HD constexpr Int mailbox_signal(Int peer, Int parity) const {
    return mailbox(num_peers(), 0) + (2 * peer + parity) * kCrossingAlignment;
  }
  /// Windows of this rank that `peer` has read in this half: a count that never goes back.
  [[nodiscard]] DEEPEP_HD constexpr Int credit(Int peer, Int half) const {
    return mailbox_signal(num_peers(), 0) + (2 * peer + half) * kCrossingAlignment;
  }
  /// Windows of `peer` whose chunk of this number has arrived in this half: a count that never goes back.
  [[nodiscard]] DEEPEP_HD constexpr Int arrived(Int peer, Int half, Int chunk) const {
    return credit(num_peers(), 0) + (2 * peer + half) * arrived_bytes() + 8 * chunk;
  }
  /// Where a chunk of `peer` arrives.
  [[nodiscard]] DEEPEP_HD constexpr Int receive_chunk(Int peer, Int half, Int chunk) const {
    return arrived(num_peers(), 0, 0) + ((2 * peer + half) * num_chunks() + chunk) * chunk_bytes();
  }
  /// Where a chunk for `peer` is made.
  [[nodiscard]] DEEPEP_HD constexpr Int send_chunk(Int peer, Int half, Int chunk) const {
    return receive_chunk(num_peers(), 0, 0) + ((2 * peer + half) * num_chunks() + chunk) * chunk_bytes();
  }
  /// A record inside a chunk.
  [[nodiscard]] DEEPEP_HD constexpr Int record(Int position) const {
    return kChunkHeader + position % kChunkRecords * record_bytes;
  }
  [[nodiscard]] DEEPEP_HD constexpr Int total_bytes() const {
    return align_up(send_chunk(num_peers(), 0, 0), Int(kCrossingAlignment));
  }

  /// For the CPU alone, staging of the fewest rows: kernels stage by local index (return_layout.hpp), so that
  /// no place has to travel. At a gateway, the row that comes back for the token with this position in a
  /// window of `peer`, from the domain's rank that is number `copy` among those it went to: it travels along.
  [[nodiscard]] DEEPEP_HD constexpr Int staged_row(Int peer, Int half, Int position, Int copy) const {
    return (((2 * peer + half) * window + position) * copies + copy) * return_bytes;
  }
  [[nodiscard]] DEEPEP_HD constexpr Int staging_bytes() const { return staged_row(num_peers(), 0, 0, 0); }

 private:
  [[nodiscard]] DEEPEP_HD constexpr Int mailbox_bytes() const {
    return align_up(8 * mailbox_words, Int(kCrossingAlignment));
  }
  [[nodiscard]] DEEPEP_HD constexpr Int arrived_bytes() const {
    return align_up(8 * num_chunks(), Int(kCrossingAlignment));
  }
};

}  // namespace deepep::layout
