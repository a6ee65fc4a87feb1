// Rows that go back by puts: which number a row has among those of its put, and where it lies. As many go back
// of a token as its owner sums: one from each rank, or in the exact mode one for each entry.
#pragma once

#include "kernels/low_latency/combine_decode.hpp"
#include "kernels/low_latency/combine_entry_sum.hpp"
#include "kernels/low_latency_far/combine_call.hpp"

namespace deepep::kernels {

/// Sums of the four bytes of each word before `token`'s, and of those before its own.
[[nodiscard]] DEEPEP_DEVICE int rows_of_tokens(dev::SharedArray<uint32_t> counts, int first, int tokens) {
  const auto sum_bytes = [](uint32_t word) { return static_cast<int>((word * 0x01010101u) >> 24); };
  int rows = 0;
  DEEPEP_ROLLED
  for (int word = 0; word < tokens / 4; ++word) rows += sum_bytes(counts.get(first + word));
  if (tokens % 4 == 0) return rows;
  return rows + sum_bytes(counts.get(first + tokens / 4) & ((1u << (8 * (tokens % 4))) - 1u));
}

/// No rows, in either table. All threads; a block barrier has to follow.
DEEPEP_DEVICE void clear_rows(const FarCombineCall& call) {
  using namespace dev;
  const FarCombineShared shared = call.far_shared();
  SharedArray<uint32_t> counts(shared.rows_that_went());
  for (int i = thread(); i < 2 * shared.num_ranks * shared.count_words; i += num_threads()) counts.set(i, 0);
}

/// Rows of the entries of this rank's tokens that are at far ranks. A warp a token. All threads, with a
/// barrier; another has to follow.
DEEPEP_DEVICE void count_sent_entries(const FarCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const FarCombineShared shared = call.far_shared();
  SharedArray<uint32_t> counts(shared.rows_that_went());
  clear_rows(call);
  sync_block();
#pragma unroll 1
  for (int t = warp(); t < args.num_tokens && !args.refused; t += num_warps()) {
    const int expert = lane() < args.num_topk ? expert_at(args, t * args.num_topk + lane()) : -1;
    const int owner = expert < 0 ? -1 : args.share.by_local_experts.quotient(expert);
#pragma unroll 1
    for (uint32_t ranks = ranks_of(args, t) & call.far.bits; ranks != 0; ranks &= ranks - 1) {
      const int rank = lowest_bit(ranks);
      const auto rows = static_cast<uint32_t>(popcount(ballot(owner == rank)));
      if (lane() == 0) counts.bit_or(rank * shared.count_words + t / 4, rows << (8 * (t % 4)));
    }
  }
}

/// Rows of the entries of far ranks' tokens that came. A warp a token. All threads, with a barrier; behind
/// `list_returns`.
DEEPEP_DEVICE void count_entries_that_came(const FarCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const FarCombineShared shared = call.far_shared();
  SharedArray<uint32_t> counts(shared.rows_that_came());
  const Presence present = present_of(call);
#pragma unroll 1
  for (uint32_t far = call.far.bits & call.live; far != 0; far &= far - 1) {
    const int source = lowest_bit(far);
#pragma unroll 1
    for (int t = warp(); t < args.max_tokens; t += num_warps()) {
      if (!present.has(source, t)) continue;
      const uint32_t entry = load_route(args, {source, t});
      const auto rows = static_cast<uint32_t>(popcount(ballot(entry != layout::kNoEntry)));
      if (lane() == 0) counts.bit_or(source * shared.count_words + t / 4, rows << (8 * (t % 4)));
    }
  }
  sync_block();
}

/// The number of the first row of this rank's token t among those that come back from a far rank,
[[nodiscard]] DEEPEP_DEVICE int number_of_sent(const FarCombineCall& call, int rank, int t) {
  if (!returns_entries(call.args)) return place_of_sent(call, rank, t);
  const FarCombineShared shared = call.far_shared();
  return rows_of_tokens(dev::SharedArray<uint32_t>(shared.rows_that_went()), rank * shared.count_words, t);
}

/// and of a far rank's token among those that go back to it.
[[nodiscard]] DEEPEP_DEVICE int number_of_came(const FarCombineCall& call, int source, int t) {
  if (!returns_entries(call.args)) return place_of_came(call, source, t);
  const FarCombineShared shared = call.far_shared();
  return rows_of_tokens(dev::SharedArray<uint32_t>(shared.rows_that_came()), source * shared.count_words, t);
}

/// All rows that come back from a far rank,
[[nodiscard]] DEEPEP_DEVICE int rows_from(const FarCombineCall& call, int rank) {
  const FarCombineShared shared = call.far_shared();
  if (returns_entries(call.args)) return number_of_sent(call, rank, 4 * shared.count_words);
  return count_tokens(dev::SharedArray<uint32_t>(shared.went()), rank * shared.token_words, shared.token_words);
}

/// and that go back to it.
[[nodiscard]] DEEPEP_DEVICE int rows_to(const FarCombineCall& call, int rank) {
  if (returns_entries(call.args)) return number_of_came(call, rank, 4 * call.far_shared().count_words);
  const Presence present = present_of(call);
  return count_tokens(present.bits, rank * present.words, present.words);
}

/// Lane k: rows of a message before that of its k-th entry; `rows`: entries that have one.
[[nodiscard]] DEEPEP_DEVICE int entries_before(uint32_t rows) {
  return dev::popcount(rows & ((1u << dev::lane()) - 1u));
}

/// Where row `number` leaves for a far rank, and has come from one.
[[nodiscard]] DEEPEP_DEVICE std::byte* leaving_row(const FarCombineCall& call, int rank, int number) {
  return leaving_for<std::byte>(call.far, call.turn, rank,
                                call.far.slots.rows() + number * int64_t{2} * call.args.hidden);
}
[[nodiscard]] DEEPEP_DEVICE std::byte* arrived_row(const FarCombineCall& call, int source, int number) {
  return arrived_at<std::byte>(call.far, call.turn, source,
                               call.far.slots.rows() + number * int64_t{2} * call.args.hidden);
}

[[nodiscard]] DEEPEP_DEVICE dev::Vec16* return_to(const FarCombineCall& call, const MessageAt& where,
                                                  int64_t offset) {
  if (is_mapped(call, where.source)) return return_to(call.near(), where, offset);
  const int number = number_of_came(call, where.source, where.token);
  return reinterpret_cast<dev::Vec16*>(leaving_row(call, where.source, number));
}
[[nodiscard]] DEEPEP_DEVICE std::byte* returned_row(const FarCombineCall& call, int source, int t,
                                                    int64_t offset) {
  if (is_mapped(call, source)) return returned_row(call.near(), source, t, offset);
  return arrived_row(call, source, number_of_sent(call, source, t));
}

[[nodiscard]] DEEPEP_DEVICE uint64_t entry_to(const FarCombineCall& call, const MessageAt& where,
                                              uint32_t rows) {
  if (is_mapped(call, where.source)) return entry_to(call.near(), where, rows);
  const int number = number_of_came(call, where.source, where.token) + entries_before(rows);
  return reinterpret_cast<uint64_t>(leaving_row(call, where.source, number));
}

/// Lane k: the number of the row of the k-th entry of this rank's token t, which a far rank `source` returns,
/// among all that do. All lanes.
[[nodiscard]] DEEPEP_DEVICE int number_of_entry(const FarCombineCall& call, int source, bool has_row, int t) {
  using namespace dev;
  const int from = has_row ? source : -1;
  int before = 0;
  DEEPEP_ROLLED
  for (int k = 0; k < call.args.num_topk; ++k) {
    const int other = shuffle(from, k);
    before += k < lane() && other == from ? 1 : 0;
  }
  const bool is_far = has_row && !is_mapped(call, source);
  return is_far ? number_of_sent(call, source, t) + before : 0;
}

[[nodiscard]] DEEPEP_DEVICE uint64_t returned_entry(const FarCombineCall& call, int source, bool has_row,
                                                    int t) {
  const int number = number_of_entry(call, source, has_row, t);
  if (!has_row || is_mapped(call, source)) return returned_entry(call.near(), source, has_row, t);
  return reinterpret_cast<uint64_t>(arrived_row(call, source, number));
}

}  // namespace deepep::kernels
