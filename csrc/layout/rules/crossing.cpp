// For the CPU alone: crossings between domains, sizes in 128 bits.
#include "layout/rules/crossing.hpp"

#include "layout/crossing_layout.hpp"
#include "layout/rules/check.hpp"

namespace deepep::host {

namespace {

constexpr int64_t kMost = int64_t{1} << 31;

/// Factors up to 2^31 keep every formula here, at most four of them multiplied, inside 128 bits.
void expect_size(const char* name, int64_t value, int64_t least = 0) {
  expect(value >= least && value <= kMost, name, value, std::to_string(least) + " .. 2^31");
}

void expect_window(int64_t window) {
  expect_size("window", window, 1);
  expect(window % layout::kChunkRecords == 0, "window", window,
         "a multiple of " + std::to_string(layout::kChunkRecords));
}

void expect_fits(layout::wide_t value, const char* what) {
  if (!layout::fits_int64(value)) throw std::overflow_error(std::string(what) + ": does not fit into 64 bits");
}

}  // namespace

int64_t num_windows(int64_t num_tokens, int64_t window) {
  expect_size("num_tokens", num_tokens);
  expect_window(window);
  return layout::Windows{num_tokens, window}.count();
}

TokenRange window_tokens(int64_t num_tokens, int64_t window, int64_t w) {
  expect_index("w", w, num_windows(num_tokens, window));
  const layout::Windows windows{num_tokens, window};
  return {windows.begin(w), windows.end(w)};
}

Turn window_turn(int64_t number) {
  expect_at_least(0, "number", number);
  const layout::WindowTurn turn{number};
  return {turn.half(), turn.arrivals(), turn.credit()};
}

int64_t default_window(int64_t num_domains) {
  expect_size("num_domains", num_domains, 1);
  return layout::default_window(num_domains);
}

int64_t chunk_records() { return layout::kChunkRecords; }

int64_t chunk_of_record(int64_t position) {
  expect_at_least(0, "position", position);
  return layout::chunk_of_record(position);
}

int64_t records_in_chunk(int64_t num_records, int64_t chunk) {
  expect_size("num_records", num_records);
  expect_size("chunk", chunk);
  return layout::records_in_chunk(num_records, chunk);
}

int64_t peer_of_domain(int64_t domain, int64_t own) {
  expect(domain != own, "domain", domain, "another than the own");
  return layout::peer_of_domain(domain, own);
}

int64_t domain_of_peer(int64_t peer, int64_t own) { return layout::domain_of_peer(peer, own); }

RecordSizes::RecordSizes(int64_t row_bytes, int64_t num_scales, int64_t domain_ranks, int64_t num_topk)
    : row_bytes_(row_bytes), num_scales_(num_scales), domain_ranks_(domain_ranks), num_topk_(num_topk) {
  expect_size("row_bytes", row_bytes);
  expect(row_bytes % 16 == 0, "row_bytes", row_bytes, "a multiple of 16");
  expect_size("num_scales", num_scales);
  expect_size("domain_ranks", domain_ranks, 1);
  expect_size("num_topk", num_topk);
}

int64_t RecordSizes::scales() const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.scales();
}
int64_t RecordSizes::token() const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.token();
}
int64_t RecordSizes::final_row(int64_t local) const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.final_row(local);
}
int64_t RecordSizes::index(int64_t k) const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.index(k);
}
int64_t RecordSizes::weight(int64_t k) const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.weight(k);
}
int64_t RecordSizes::bytes() const {
  return layout::CrossingRecord<int64_t>{row_bytes_, num_scales_, domain_ranks_, num_topk_}.bytes();
}
int64_t RecordSizes::return_weight(int64_t k) const {
  return layout::ReturnRecord<int64_t>{row_bytes_, num_topk_}.weight(k);
}
int64_t RecordSizes::return_bytes() const {
  return layout::ReturnRecord<int64_t>{row_bytes_, num_topk_}.bytes();
}

CrossingBuffer::CrossingBuffer(int64_t num_domains, int64_t window, int64_t record_bytes,
                               int64_t return_bytes, int64_t copies, int64_t mailbox_words)
    : num_domains_(num_domains),
      window_(window),
      record_bytes_(record_bytes),
      return_bytes_(return_bytes),
      copies_(copies),
      mailbox_words_(mailbox_words) {
  expect_size("num_domains", num_domains, 2);
  expect_window(window);
  expect_size("record_bytes", record_bytes);
  expect_size("return_bytes", return_bytes);
  expect(return_bytes <= record_bytes, "return_bytes", return_bytes, "no more than record_bytes");
  expect_size("copies", copies, 1);
  expect_size("mailbox_words", mailbox_words);
  const layout::CrossingBuffer<layout::wide_t> wide{.num_domains = num_domains,
                                                    .window = window,
                                                    .record_bytes = record_bytes,
                                                    .return_bytes = return_bytes,
                                                    .copies = copies,
                                                    .mailbox_words = mailbox_words};
  expect_fits(wide.total_bytes(), "crossing_buffer");
  expect_fits(wide.staging_bytes(), "crossing_staging");
}

layout::CrossingBuffer<int64_t> CrossingBuffer::core() const {
  return {.num_domains = num_domains_,
          .window = window_,
          .record_bytes = record_bytes_,
          .return_bytes = return_bytes_,
          .copies = copies_,
          .mailbox_words = mailbox_words_};
}
int64_t CrossingBuffer::num_chunks() const { return core().num_chunks(); }
int64_t CrossingBuffer::chunk_bytes() const { return core().chunk_bytes(); }
int64_t CrossingBuffer::mailbox(int64_t peer, int64_t parity) const {
  return core().mailbox(peer, parity);
}
int64_t CrossingBuffer::mailbox_signal(int64_t peer, int64_t parity) const {
  return core().mailbox_signal(peer, parity);
}
int64_t CrossingBuffer::credit(int64_t peer, int64_t half) const {
  return core().credit(peer, half);
}
int64_t CrossingBuffer::arrived(int64_t peer, int64_t half, int64_t chunk) const {
  return core().arrived(peer, half, chunk);
}
int64_t CrossingBuffer::receive_chunk(int64_t peer, int64_t half, int64_t chunk) const {
  return core().receive_chunk(peer, half, chunk);
}
int64_t CrossingBuffer::send_chunk(int64_t peer, int64_t half, int64_t chunk) const {
  return core().send_chunk(peer, half, chunk);
}
int64_t CrossingBuffer::record(int64_t position) const {
  return core().record(position);
}
int64_t CrossingBuffer::total_bytes() const { return core().total_bytes(); }
int64_t CrossingBuffer::staged_row(int64_t peer, int64_t half, int64_t position, int64_t copy) const {
  return core().staged_row(peer, half, position, copy);
}
int64_t CrossingBuffer::staging_bytes() const { return core().staging_bytes(); }

}  // namespace deepep::host
