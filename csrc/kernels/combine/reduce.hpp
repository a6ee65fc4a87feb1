// The sums: warps take tokens in turn, wait for their rows' flags, and sum (sum_row.hpp).
#pragma once

#include "kernels/combine/digest.hpp"
#include "kernels/combine/sum_row.hpp"

namespace deepep::kernels {

/// A warp's turn: a token, or a part of one, and where its rows are. The turns of a block are taken in order.
struct Turn {
  uint32_t item;    // a part of a token
  int32_t at_rank;  // of lane r: the token's row at rank r, or -1; loaded a turn ahead
};

/// `first`: where rows are few every push warp has its first turn by its number.
[[nodiscard]] DEEPEP_DEVICE Turn take_turn(const CombineCall& call, const CombinePlan& plan, bool first) {
  using namespace dev;
  const Group& g = call.g;
  const CombineRole& role = plan.role;
  SharedArray<uint32_t> taken(CombineShared{g.num_ranks}.taken());
  uint32_t n = static_cast<uint32_t>(warp());
  if (!first || !role.is_single || warp() >= role.push_warps) {
    if (lane() == 0) n = taken.add(0, 1u) + static_cast<uint32_t>(role.is_single ? role.push_warps : 0);
    n = shuffle(n, 0);
  }
  const int block_turn = block() - num_blocks() + role.reduce_blocks;
  Turn turn{n * static_cast<uint32_t>(role.reduce_blocks) + static_cast<uint32_t>(block_turn), -1};
  const int64_t t = plan.parts.row_of(turn.item);
  if (t < call.args.num_tokens && lane() < g.num_ranks && is_live(g, lane()))
    turn.at_rank = load_once(call.args.send_row + t * g.num_ranks + lane());
  return turn;
}

/// Whether the warp has a single item to push: then it takes its first turn before, so that what it needs for
/// its sum is on the way meanwhile. All others take it when they are done with what comes before their sums.
[[nodiscard]] DEEPEP_DEVICE bool takes_turn_early(const CombineRole& role) {
  return role.is_single && dev::warp() < role.push_warps;
}

[[nodiscard]] DEEPEP_DEVICE Turn take_early_turn(const CombineCall& call, const CombinePlan& plan) {
  return takes_turn_early(plan.role) ? take_turn(call, plan, true) : Turn{0, -1};
}

/// How long a turn's rows are waited for.
DEEPEP_DEVICE void measure_rows(const CombineCall& call, const TokenRows& rows, uint32_t part) {
  using namespace dev;
  const std::byte* flags = call.g.heap[call.g.rank] + call.g.staging_offset;
  measure_wait(sums_of(call.g, Waited::kReturnedRows), rows.is_remote(), call.deadline, [&] {
    const auto* flag = reinterpret_cast<const uint32_t*>(flags + call.args.staging.flag(rows.place, part));
    return load<relaxed, sys_scope>(flag) == call.epoch;
  });
}

/// This warp's turns; `turn`: the first, if it was taken early. Waits for the digests, too: rows of a rank that
/// disagrees are not where they belong. False if a rank disagrees or a row did not come.
template <class Row>
[[nodiscard]] DEEPEP_DEVICE bool reduce_rows(const CombineCall& call, const CombinePlan& plan, Turn turn) {
  using namespace dev;
  if (!plan.role.reduces) return true;
  const CombineArgs& args = call.args;
  const Group& g = call.g;
  const layout::Parts parts = plan.parts;
  const auto count = call.counts();
  if (!takes_turn_early(plan.role)) turn = take_turn(call, plan, true);
  const std::byte* area = g.heap[g.rank] + g.staging_offset;
  const int chunks = static_cast<int>(args.row_bytes / 16);

  // Lane r handles rank r: how far that rank's rows are from their place in the staging here.
  const bool handles = lane() < g.num_ranks && is_live(g, lane());
  const int32_t to_place = handles ? static_cast<int32_t>(layout::first_staging_row(count, g.rank, lane()) -
                                                          layout::first_row_of_source(count, g.rank, lane()))
                                   : 0;
  enter(call.lines, Step::kWaitMetadata);
  measure_digests(call);
  bool fails = !wait_digests(call, digest_of(call));
#pragma unroll 1
  for (;;) {
    const uint32_t t = parts.row_of(turn.item);
    if (fails || t >= args.num_tokens) break;
    const uint32_t part = parts.part_of(turn.item);
    enter(call.lines, Step::kReduce);
    const TokenRows rows{turn.at_rank, turn.at_rank + to_place, ballot(turn.at_rank >= 0),
                         ballot(turn.at_rank >= 0 && lane() != g.rank)};
    const Addends addends = list_addends(args, t, rows);
    const Row own = Row::of(args, shuffle(turn.at_rank, g.rank));
    const bool is_pair = !Row::kExpanded && is_pair_of(addends);
    const int from = parts.begin(chunks, part);
    const int end = parts.begin(chunks, part + 1);
    prefetch_start(own, from, end);
    // What is here already comes to the registers while the peers' rows are on their way.
    Vec16 here[kPairUnroll];
    set_to_negative_zero(here);
    const Vec16* early = pair_of(addends).here;
    if (is_pair && early != nullptr) read_pieces(early + from + lane(), end - from - lane(), here);
    turn = take_turn(call, plan, false);
    enter(call.lines, Step::kWaitRows);
    if (measures_waits(g)) measure_rows(call, rows, part);
    bool came = true;
    if (rows.is_remote()) {
      const uint32_t* flag = reinterpret_cast<const uint32_t*>(area + args.staging.flag(rows.place, part));
      came = wait_equal<acquire, sys_scope>(flag, call.epoch, call.deadline);
      if (!came) note_fault(g, Phase::kReturn, 1u << lane(), call.epoch, load<relaxed, sys_scope>(flag));
    }
    fails = ballot(!came) != 0;
    if (fails) break;  // the deadline has passed: what is still missing will not be waited for again
    // The lanes' acquires come before the whole warp's reads; a ballot orders no memory.
    sync_warp();
    enter(call.lines, Step::kReduce);
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * args.row_bytes);
    if constexpr (Row::kExpanded)
      reduce_expanded(out, addends, place_of_own(args, rows), own, from, end);
    else if (is_pair)
      reduce_pair(out, pair_of(addends), from, end, here);
    else
      reduce_many(out, addends, from, end);
    if (parts.is_last(part) && args.num_topk > 0) reduce_weights(args, t, rows, own);
  }
  return !fails;
}

}  // namespace deepep::kernels
