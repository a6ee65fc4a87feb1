// The way back of rows whose token belongs to another rank, by push warps; and the flags behind them, by one
// warp.
#pragma once

#include "kernels/combine/credit.hpp"
#include "kernels/combine/row.hpp"

namespace deepep::kernels {

/// Calls visit(owner, row here, row in the owner's staging) for every owner that has an n-th row; `nth` may be
/// a lane's own, all lanes come along. Whole warps.
template <class Visit>
DEEPEP_DEVICE void for_each_owner(const Group& g, const ReturnRows& returns, uint32_t nth, const Visit& visit) {
  using namespace dev;
  DEEPEP_ROLLED
  for (int owner = g.rank + 1;; ++owner) {
    if (owner == g.num_ranks) owner = 0;
    if (owner == g.rank) break;
    const int32_t place = shuffle(returns.first_place, owner) + static_cast<int32_t>(nth);
    const int32_t row = shuffle(returns.first_row, owner) + static_cast<int32_t>(nth);
    if (nth < static_cast<uint32_t>(shuffle(returns.rows, owner))) visit(owner, row, place);
  }
}

/// A push warp's items: first, first + step, ... below `end`. Each is a part of every owner's n-th row: all
/// owners' rows side by side and in order, so that no owner's sums wait for another's.
struct ReturnItems {
  uint32_t first;
  uint32_t step;
  uint32_t end;

  [[nodiscard]] DEEPEP_DEVICE uint32_t count() const {
    return first < end ? (end - first + step - 1) / step : 0;
  }
};

[[nodiscard]] DEEPEP_DEVICE ReturnItems items_of_warp(const CombinePlan& plan, int warp) {
  return {static_cast<uint32_t>(warp * plan.role.push_blocks + dev::block()),
          static_cast<uint32_t>(plan.role.push_blocks * plan.role.push_warps), plan.num_items};
}

/// One part of a received row to its place in the owner's staging. One warp. The weights travel with the last
/// part. `credit`: whether it may be stored; if that is not known yet, it is waited for between the loads and
/// the stores.
template <class Row>
DEEPEP_DEVICE void push_row(const CombineCall& call, int owner, int64_t row, int64_t place, uint32_t part,
                            layout::Parts parts, uint32_t& credit) {
  using namespace dev;
  const CombineArgs& args = call.args;
  const Group& g = args.group;
  std::byte* area = g.heap[owner] + g.staging_offset;
  const Row source = Row::of(args, row);
  Vec16* target = reinterpret_cast<Vec16*>(area + args.staging.row(place));
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int end = parts.begin(chunks, part + 1);
  prefetch_start(source, parts.begin(chunks, part), end);
  float weight = 0.0f;
  if (parts.is_last(part) && lane() < args.num_topk) weight = source.weight();
  int begin = parts.begin(chunks, part) + lane();
  // Once for a part that is empty, too: it has a flag as any other.
#pragma unroll 1
  do {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 v[Row::kUnroll];
    source.read(begin, left, v);
    if (credit == 0) {
      enter(call.lines, Step::kWaitCredit);
      credit = has_shared_credit(g) ? kGranted : kNoCredit;
      enter(call.lines, Step::kPushRows);
    }
    if (credit == kNoCredit) return;
#pragma unroll
    for (int u = 0; u < Row::kUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(target + begin + u * kWarpSize, v[u]);
    begin += Row::kUnroll * kWarpSize;
  } while (begin < end + lane());
  if (parts.is_last(part) && lane() < args.num_topk)
    store(reinterpret_cast<float*>(area + args.staging.weights(place)) + lane(), weight);
}

/// A push warp's share of the rows. False if an owner has not granted credit. Where it has several items the
/// signal warp follows its progress.
template <class Row>
[[nodiscard]] DEEPEP_DEVICE bool push_rows(const CombineCall& call, const CombinePlan& plan) {
  using namespace dev;
  if (warp() >= plan.role.push_warps) return true;
  enter(call.lines, Step::kPushRows);
  const ReturnItems items = items_of_warp(plan, warp());
  SharedArray<uint32_t> progress(CombineShared{call.g.num_ranks}.progress());
  uint32_t credit = 0;
  uint32_t done = 0;
#pragma unroll 1
  for (uint32_t item = items.first; item < items.end && credit != kNoCredit; item += items.step) {
    const uint32_t part = plan.parts.part_of(item);
    for_each_owner(call.g, plan.returns, plan.parts.row_of(item), [&](int owner, int64_t row, int64_t place) {
      if (credit != kNoCredit) push_row<Row>(call, owner, row, place, part, plan.parts, credit);
    });
    if (plan.role.is_single) continue;
    sync_warp();  // the warp's stores come before lane 0's release
    if (lane() == 0) progress.set<release>(warp(), ++done);
  }
  return credit != kNoCredit;
}

/// The signal warp: raises the block's flags, lane w those of warp w. A fence makes its thread wait until the
/// peers have what was stored before it. One of a warp that pushes nothing else meanwhile costs nobody
/// anything, and serves the items of all: where they are many it follows the others' progress, else it comes
/// behind all of them, and a block barrier.
DEEPEP_DEVICE void signal_rows(const CombineCall& call, const CombinePlan& plan) {
  using namespace dev;
  if (plan.role.is_single && plan.role.signal_warp >= 0) sync_block();
  if (warp() != plan.role.signal_warp) return;
  enter(call.lines, Step::kSignal);
  const Group& g = call.g;
  if (!has_shared_credit(g)) return;
  SharedArray<uint32_t> progress(CombineShared{g.num_ranks}.progress());
  const ReturnItems items = items_of_warp(plan, lane());
  const uint32_t total = lane() < plan.role.push_warps ? items.count() : 0;
  uint32_t raised = 0;
#pragma unroll 1
  while (ballot(raised < total) != 0) {
    uint32_t done = total;
    // Acquire: the warp's stores come before what this one does now; the fence carries them before the flags.
    if (!plan.role.is_single && raised < total) done = progress.get<acquire>(lane());
    if (ballot(raised < done) == 0) {
      pause();
      continue;
    }
    fence<acq_rel, sys_scope>();
#pragma unroll 1
    for (; ballot(raised < done) != 0; raised += raised < done ? 1u : 0u) {
      const uint32_t item = items.first + raised * items.step;
      const uint32_t nth = raised < done ? plan.parts.row_of(item) : 0xffffffffu;  // no owner has that
      for_each_owner(g, plan.returns, nth, [&](int owner, int64_t, int64_t place) {
        std::byte* flag =
            g.heap[owner] + g.staging_offset + call.args.staging.flag(place, plan.parts.part_of(item));
        store<relaxed, sys_scope>(reinterpret_cast<uint32_t*>(flag), call.epoch);
      });
    }
  }
}

}  // namespace deepep::kernels
