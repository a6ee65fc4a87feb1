// The rules of layout/crossing_layout.hpp for the host: std::invalid_argument for values that make no
// sense, std::overflow_error for memory that 64 bits do not hold.
// For the CPU alone.
#pragma once

#include <cstdint>

namespace deepep::layout {
template <class Int>
struct CrossingBuffer;
}

namespace deepep::host {

/// First token and the one past the last of window `w` of a call with so many tokens.
struct TokenRange {
  int64_t begin;
  int64_t end;
};
[[nodiscard]] int64_t num_windows(int64_t num_tokens, int64_t window);
[[nodiscard]] TokenRange window_tokens(int64_t num_tokens, int64_t window, int64_t w);

/// layout::WindowTurn of a window's number.
struct Turn {
  int64_t half;
  int64_t arrivals;
  int64_t credit;
};
[[nodiscard]] Turn window_turn(int64_t number);

[[nodiscard]] int64_t default_window(int64_t num_domains);
[[nodiscard]] int64_t chunk_records();
[[nodiscard]] int64_t chunk_of_record(int64_t position);
[[nodiscard]] int64_t records_in_chunk(int64_t num_records, int64_t chunk);
[[nodiscard]] int64_t peer_of_domain(int64_t domain, int64_t own);
[[nodiscard]] int64_t domain_of_peer(int64_t peer, int64_t own);

/// Offsets of a record's parts: layout::CrossingRecord and ReturnRecord.
class RecordSizes {
 public:
  RecordSizes(int64_t row_bytes, int64_t num_scales, int64_t domain_ranks, int64_t num_topk);

  [[nodiscard]] int64_t scales() const;
  [[nodiscard]] int64_t token() const;
  [[nodiscard]] int64_t final_row(int64_t local) const;
  [[nodiscard]] int64_t index(int64_t k) const;
  [[nodiscard]] int64_t weight(int64_t k) const;
  [[nodiscard]] int64_t bytes() const;
  [[nodiscard]] int64_t return_weight(int64_t k) const;
  [[nodiscard]] int64_t return_bytes() const;

 private:
  int64_t row_bytes_, num_scales_, domain_ranks_, num_topk_;
};

/// layout::CrossingBuffer<int64_t>, made only of sizes whose totals fit. Every method is the one of that name
/// there.
class CrossingBuffer {
 public:
  CrossingBuffer(int64_t num_domains, int64_t window, int64_t record_bytes, int64_t return_bytes,
                 int64_t copies, int64_t mailbox_words);

  [[nodiscard]] int64_t num_chunks() const;
  [[nodiscard]] int64_t chunk_bytes() const;
  [[nodiscard]] int64_t mailbox(int64_t peer, int64_t parity) const;
  [[nodiscard]] int64_t mailbox_signal(int64_t peer, int64_t parity) const;
  [[nodiscard]] int64_t credit(int64_t peer, int64_t half) const;
  [[nodiscard]] int64_t arrived(int64_t peer, int64_t half, int64_t chunk) const;
  [[nodiscard]] int64_t receive_chunk(int64_t peer, int64_t half, int64_t chunk) const;
  [[nodiscard]] int64_t send_chunk(int64_t peer, int64_t half, int64_t chunk) const;
  [[nodiscard]] int64_t record(int64_t position) const;
  [[nodiscard]] int64_t total_bytes() const;
  [[nodiscard]] int64_t staged_row(int64_t peer, int64_t half, int64_t position, int64_t copy) const;
  [[nodiscard]] int64_t staging_bytes() const;

 private:
  [[nodiscard]] layout::CrossingBuffer<int64_t> core() const;

  int64_t num_domains_, window_, record_bytes_, return_bytes_, copies_, mailbox_words_;
};

}  // namespace deepep::host
