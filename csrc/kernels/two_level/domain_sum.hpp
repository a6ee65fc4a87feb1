// The sum of a domain's rows of a token: ranks ascending, in fp32, rounded once. At a gateway, it crosses; at
// the token's owner, it is one of the addends of the last sum (owner_sum.hpp).
#pragma once

#include "kernels/two_level/give_back.hpp"

namespace deepep::kernels {

/// A token's rows in this domain, as its gateway finds them.
struct DomainRows {
  int slot;        // of the token's owner
  int64_t half;    // of its window
  int64_t token;   // from the window's first on
  int64_t own;     // its row here, if there is one
  uint32_t ranks;  // the domain's ranks that have one, by local index, as bits
};

/// Waits for all neighbours' chunk of a window, a thread a neighbour.
DEEPEP_DEVICE void wait_returned(const TwoLevelCombineCall& call, const ItemTurn& turn, int slot,
                                 const layout::WindowTurn& number, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Group& g = call.near.g;
  for (int local = thread(); local < g.num_ranks; local += num_threads()) {
    if (local == g.rank || !is_live(g, local)) continue;
    const uint32_t* returned = at<uint32_t>(
        g, g.rank, g.staging_offset + two_level.staging.returned(slot, number.half(), chunk, local));
    const auto wanted = static_cast<uint32_t>(number.arrivals());
    if (wait_reached<acquire, sys_scope>(returned, wanted, call.near.deadline)) continue;
    note_late(g, Phase::kReturn, call.all.first_neighbour + local, wanted, returned);
    turn.give_up();
  }
}

/// All neighbours may write where a window of `source` lay: it was summed. One thread, which knows of all
/// reading.
DEEPEP_DEVICE void grant_staging(const TwoLevelCombineCall& call, int source,
                                 const layout::WindowTurn& number) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const Group& g = call.near.g;
  for (int local = 0; local < g.num_ranks; ++local) {
    if (local == g.rank || !is_live(g, local)) continue;
    store<release, sys_scope>(
        at<uint32_t>(g, local, g.staging_offset + two_level.staging.summed(source, number.half())),
        static_cast<uint32_t>(number.arrivals()));
  }
}

/// The rows as addends, ranks ascending. One warp.
[[nodiscard]] DEEPEP_DEVICE Addends list_rows(const TwoLevelCombineCall& call, const DomainRows& rows) {
  using namespace dev;
  const CombineArgs& args = call.args.combine;
  const int own = call.near.g.rank;
  Addends addends{0, 0, 0};
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int local = lowest_bit(left);
    const std::byte* row = local == own
                               ? args.x + rows.own * args.row_bytes
                               : staged_row(call, call.near.g.rank, rows.slot, rows.half, rows.token, local);
    if (lane() == addends.count) addends.address = reinterpret_cast<uint64_t>(row);
    ++addends.count;
  }
  return addends;
}

/// Entry `lane()` of the weights that the domain returns for a token.
[[nodiscard]] DEEPEP_DEVICE float sum_weights(const TwoLevelCombineCall& call, const DomainRows& rows) {
  using namespace dev;
  const CombineArgs& args = call.args.combine;
  const int own = call.near.g.rank;
  float weight = 0.0f;
  if (lane() >= args.num_topk) return weight;
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int local = lowest_bit(left);
    const auto* from = local == own
                           ? args.topk_weights + rows.own * args.num_topk + lane()
                           : reinterpret_cast<const float*>(
                                 staged_row(call, call.near.g.rank, rows.slot, rows.half, rows.token, local) +
                                 call.args.record.weight(lane()));
    weight = add_rounded(weight, load(from));
  }
  return weight;
}

/// At the gateway of a source of another domain: a chunk of a window's sums, and their crossing. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool send_sums(const TwoLevelCombineCall& call, const ItemTurn& turn, int i,
                                           int64_t window, int chunk) {
  using namespace dev;
  const TwoLevelArgs& two_level = call.two_level;
  const CombineArgs& args = call.args.combine;
  const int rail = two_level.rails.in[i];
  const int source = two_level.rails.peer[rail];
  if (window < 0 || window >= windows_of(call, source)) return true;
  const layout::WindowTurn number{static_cast<int64_t>(return_number(call, source, window))};
  const uint64_t sent = load(&two_level.state->sent[rail]) + static_cast<uint64_t>(window);
  const int slot = two_level.rails.slot[source];
  if (thread() == 0) {
    const uint64_t* asked = remote_at<uint64_t>(two_level, two_level.layout.ask_signal(rail, number.half()));
    const auto wanted = static_cast<uint32_t>(number.arrivals());
    if (!wait_signal<acquire, sys_scope>(asked, wanted, call.near.deadline)) {
      note_late(call.near.g, Phase::kReturn, source, wanted, asked);
      turn.give_up();
    }
    wait_window_credit(two_level, call.near.g, turn, rail, sent, call.near.deadline);
  }
  wait_returned(call, turn, slot, number, chunk);
  if (!turn.is_ready()) return false;
  const ChunkTokens tokens = tokens_of_chunk(two_level, tokens_of(call, source), window, chunk);
  const auto* asked = remote_at<uint32_t>(two_level, two_level.layout.ask(rail, number.half()));
  const int64_t first = chunk * int64_t{layout::kChunkRecords};
  const uint32_t mine = lane() < tokens.size() ? load(asked + first + lane()) : 0;
  const uint32_t returning = ballot(mine != 0);
  const int records = popcount(returning);
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(sent)}.half();
  auto* begin = remote_at<std::byte>(two_level, two_level.layout.windows.send_chunk(rail, half, chunk));
  const int64_t stride = call.args.record.bytes();
  const int pieces = static_cast<int>(args.row_bytes / 16);
  if (thread() == 0) store(reinterpret_cast<Vec16*>(begin), Vec16{{static_cast<uint32_t>(records), 0, 0, 0}});
#pragma unroll 1
  for (int n = warp(); n < records; n += num_warps()) {
    const int t = nth_bit(returning, n);
    const DomainRows rows{.slot = slot,
                          .half = number.half(),
                          .token = first + t,
                          .own = first_row_from(call, source, tokens.begin + t),
                          .ranks = shuffle(mine, t)};
    std::byte* record = begin + layout::kChunkHeader + n * stride;
    reduce_many(reinterpret_cast<Vec16*>(record), list_rows(call, rows), 0, pieces);
    const float weight = sum_weights(call, rows);
    if (lane() < args.num_topk)
      store(reinterpret_cast<float*>(record + call.args.record.weight(lane())), weight);
    pad_record(record, call.args.record.weight(args.num_topk), stride);
  }
  sync_block();
  if (thread() != 0) return true;
  // Counted before the put: what the owner does behind it lets the window after the next come to be counted.
  const bool is_last = count_chunk(two_level, &two_level.state->summed[slot][number.half()]);
  put_chunk(two_level, rail, sent, chunk, records * stride);
  if (is_last) grant_staging(call, source, number);
  return true;
}

}  // namespace deepep::kernels
