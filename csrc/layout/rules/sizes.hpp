// Capacities and buffer sizes, evaluated in 128 bits: std::overflow_error where 64 cannot hold the result,
// std::invalid_argument where an argument makes no sense.
// For the CPU alone.
#pragma once

#include <cstdint>

namespace deepep::layout {
template <class Int>
struct LowLatencyBuffer;
}

namespace deepep::host {

[[nodiscard]] int64_t max_rows_received(int64_t num_ranks, int64_t num_max_tokens);
[[nodiscard]] int64_t max_rows_expanded(int64_t num_ranks, int64_t num_max_tokens, int64_t num_topk,
                                        int64_t num_local_experts, int64_t alignment, bool has_duplicates);

/// Bytes of layout::SlotLayout: the received rows of one high-throughput dispatch. num_rows = max_rows_received
/// never runs short.
[[nodiscard]] int64_t receive_slot_bytes(int64_t num_rows, int64_t row_bytes, int64_t num_scales,
                                         int64_t num_topk, int64_t index_bytes);

/// Bytes of a rank's memory for its NIC in low-latency calls between domains: layout::LowLatencyFarSlots, of a
/// rank with the most of other domains. None with one domain. returns_entries: the exact mode, a row goes back
/// for each top-k entry; has_gateways: calls go in two levels, between domains of one size.
[[nodiscard]] int64_t low_latency_nic_bytes(int64_t num_ranks, int64_t ranks_per_domain,
                                            int64_t num_experts, int64_t num_max_tokens, int64_t num_topk,
                                            int64_t hidden, bool returns_entries, bool has_gateways);

/// layout::LowLatencyBuffer<int64_t>, made only of sizes whose total fits. Every method is the one of that
/// name there.
class LowLatencyBuffer {
 public:
  LowLatencyBuffer(int64_t num_ranks, int64_t num_max_tokens, int64_t hidden, int64_t num_topk);

  [[nodiscard]] int64_t dispatch_message_bytes() const;
  [[nodiscard]] int64_t combine_message_bytes() const;
  [[nodiscard]] int64_t dispatch_flag(int64_t epoch, int64_t source) const;
  [[nodiscard]] int64_t combine_flag(int64_t epoch, int64_t source) const;
  [[nodiscard]] int64_t dispatch_send(int64_t epoch, int64_t token) const;
  [[nodiscard]] int64_t dispatch_slot(int64_t epoch, int64_t source, int64_t position) const;
  [[nodiscard]] int64_t combine_slot(int64_t epoch, int64_t token, int64_t k) const;
  [[nodiscard]] int64_t total_bytes() const;
  [[nodiscard]] static int64_t num_epochs();

 private:
  [[nodiscard]] layout::LowLatencyBuffer<int64_t> core() const;

  int64_t num_ranks_, num_max_tokens_, hidden_, num_topk_;
};

[[nodiscard]] int64_t max_topk();

}  // namespace deepep::host
