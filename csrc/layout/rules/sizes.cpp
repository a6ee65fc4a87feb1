// For the CPU alone: sizes in 128 bits.
#include "layout/rules/sizes.hpp"

#include <initializer_list>
#include <limits>
#include <utility>

#include "layout/low_latency_far_slots.hpp"
#include "layout/rules/capacity.hpp"
#include "layout/rules/check.hpp"
#include "layout/rules/low_latency_buffer.hpp"
#include "layout/symmetric_layout.hpp"

namespace deepep::host {

namespace {

int64_t as_size(layout::wide_t value, const char* what) {
  if (!layout::fits_int64(value)) throw std::overflow_error(std::string(what) + ": does not fit into 64 bits");
  return int64_t(value);
}

/// Factors up to 2^31 keep every formula here, at most four of them multiplied, inside 128 bits.
void expect_factors(std::initializer_list<std::pair<const char*, int64_t>> factors) {
  for (const auto& [name, value] : factors) {
    expect(value >= 0 && value <= int64_t(1) << 31, name, value, "0 .. 2^31");
  }
}

}  // namespace

int64_t max_rows_received(int64_t num_ranks, int64_t num_max_tokens) {
  expect_factors({{"num_ranks", num_ranks}, {"num_max_tokens", num_max_tokens}});
  return as_size(layout::max_rows_received(num_ranks, num_max_tokens), "max_rows_received");
}

int64_t max_rows_expanded(int64_t num_ranks, int64_t num_max_tokens, int64_t num_topk,
                          int64_t num_local_experts, int64_t alignment, bool has_duplicates) {
  expect_factors({{"num_ranks", num_ranks},
                  {"num_max_tokens", num_max_tokens},
                  {"num_topk", num_topk},
                  {"num_local_experts", num_local_experts},
                  {"alignment", alignment}});
  expect_at_least(1, "alignment", alignment);
  return as_size(layout::max_rows_expanded(num_ranks, num_max_tokens, num_topk, num_local_experts, alignment,
                                           has_duplicates),
                 "max_rows_expanded");
}

int64_t receive_slot_bytes(int64_t num_rows, int64_t row_bytes, int64_t num_scales, int64_t num_topk,
                           int64_t index_bytes) {
  expect_factors({{"num_rows", num_rows},
                  {"row_bytes", row_bytes},
                  {"num_scales", num_scales},
                  {"num_topk", num_topk},
                  {"index_bytes", index_bytes}});
  constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
  expect(num_scales <= kInt32, "num_scales", num_scales, "fewer than 2^31");
  expect(num_topk <= kInt32, "num_topk", num_topk, "fewer than 2^31");
  expect(index_bytes == 4 || index_bytes == 8, "index_bytes", index_bytes, "4 or 8");
  // The layout computes in 64 bits; what it adds up is at most this.
  const layout::wide_t row = layout::wide_t(row_bytes) + 4 + 4 * num_scales + num_topk * (index_bytes + 4);
  (void)as_size(num_rows * row + 5 * layout::kLine, "receive_slot");
  const layout::SlotLayout slot{.capacity = num_rows,
                                .row_bytes = row_bytes,
                                .num_scales = int(num_scales),
                                .num_topk = int(num_topk),
                                .index_bytes = int(index_bytes)};
  return slot.bytes();
}

int64_t low_latency_nic_bytes(int64_t num_ranks, int64_t ranks_per_domain, int64_t num_experts,
                              int64_t num_max_tokens, int64_t num_topk, int64_t hidden, bool returns_entries,
                              bool has_gateways) {
  expect_factors({{"num_ranks", num_ranks},
                  {"ranks_per_domain", ranks_per_domain},
                  {"num_experts", num_experts},
                  {"num_max_tokens", num_max_tokens},
                  {"num_topk", num_topk},
                  {"hidden", hidden}});
  expect_at_least(1, "num_ranks", num_ranks);
  expect_at_least(1, "ranks_per_domain", ranks_per_domain);
  expect_at_least(1, "num_experts", num_experts);
  constexpr int64_t kMost = int64_t(1) << 27;  // eight times as many bytes are still an int
  expect(num_ranks <= kMost, "num_ranks", num_ranks, "at most 2^27");
  expect(num_experts <= kMost, "num_experts", num_experts, "at most 2^27");
  expect(num_max_tokens <= kMost, "num_max_tokens", num_max_tokens, "at most 2^27");
  expect(num_topk <= kMost, "num_topk", num_topk, "at most 2^27");
  expect(num_experts % num_ranks == 0, "num_experts", num_experts, "a multiple of num_ranks");
  if (ranks_per_domain >= num_ranks) return 0;
  const int64_t num_local_experts = num_experts / num_ranks;
  expect(!has_gateways || num_ranks % ranks_per_domain == 0, "ranks_per_domain", ranks_per_domain,
         "a divisor of num_ranks, with gateways");
  const int64_t rows = returns_entries ? num_topk : 1;  // that go back of a token
  const layout::wide_t token = layout::wide_t(12) * num_topk + layout::wide_t(2 + 3 * rows) * hidden + 64;
  (void)as_size(4 * num_ranks * (num_max_tokens * token + 16 * num_local_experts + 8 * layout::kLine),
                "low_latency_nic_bytes");
  const layout::Placement place(0, int32_t(num_ranks), int32_t(ranks_per_domain));
  const int far = has_gateways ? place.num_domains() - 1 : layout::max_far_ranks(place);
  const int word_sets = has_gateways ? int(ranks_per_domain) : 1;
  return layout::LowLatencyFarSlots(far, int(num_local_experts), int(num_max_tokens), int(num_topk), 2 * hidden,
                                    int(rows), word_sets)
      .bytes();
}

LowLatencyBuffer::LowLatencyBuffer(int64_t num_ranks, int64_t num_max_tokens, int64_t hidden, int64_t num_topk)
    : num_ranks_(num_ranks), num_max_tokens_(num_max_tokens), hidden_(hidden), num_topk_(num_topk) {
  expect_factors({{"num_ranks", num_ranks},
                  {"num_max_tokens", num_max_tokens},
                  {"hidden", hidden},
                  {"num_topk", num_topk}});
  (void)as_size(
      layout::LowLatencyBuffer<layout::wide_t>{num_ranks, num_max_tokens, hidden, num_topk}.total_bytes(),
      "low_latency_buffer");
}

layout::LowLatencyBuffer<int64_t> LowLatencyBuffer::core() const {
  return {num_ranks_, num_max_tokens_, hidden_, num_topk_};
}
int64_t LowLatencyBuffer::dispatch_message_bytes() const { return core().dispatch_message_bytes(); }
int64_t LowLatencyBuffer::combine_message_bytes() const { return core().combine_message_bytes(); }
int64_t LowLatencyBuffer::dispatch_flag(int64_t epoch, int64_t source) const {
  return core().dispatch_flag(epoch, source);
}
int64_t LowLatencyBuffer::combine_flag(int64_t epoch, int64_t source) const {
  return core().combine_flag(epoch, source);
}
int64_t LowLatencyBuffer::dispatch_send(int64_t epoch, int64_t token) const {
  return core().dispatch_send(epoch, token);
}
int64_t LowLatencyBuffer::dispatch_slot(int64_t epoch, int64_t source, int64_t position) const {
  return core().dispatch_slot(epoch, source, position);
}
int64_t LowLatencyBuffer::combine_slot(int64_t epoch, int64_t token, int64_t k) const {
  return core().combine_slot(epoch, token, k);
}
int64_t LowLatencyBuffer::total_bytes() const { return core().total_bytes(); }
int64_t LowLatencyBuffer::num_epochs() { return layout::kNumEpochs; }

int64_t max_topk() { return layout::kMaxTopk; }

}  // namespace deepep::host
