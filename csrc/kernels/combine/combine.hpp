// High-throughput combine: rows go back to their tokens' owner and are summed there as they arrive.
//
//   return    push warps send each received row to its owner's staging; one of the block's warps has asked whether
//             that is free, and one raises flags behind the rows. Or the copy engine returns them, and all warps sum
//             (copy_engine.hpp)
//   reduce    the other warps, and push warps that are done, take tokens in order: for each, wait for the flags of its
//             remote rows, sum bias and rows in rank order in fp32, round once, write. A rank's own row is read
//             where it lies, and while its peers' are still on their way.
//   lend      at the start of this rank's next combine, or in its next dispatch, the peers hear that its staging may
//             be written again: the kernel that read it has ended by then
//
// Who waits for whom: an asker waits until the owner has lent its staging anew (normally told by the dispatch
// in between, so long ago); a reduce warp waits for flags. Pushing waits for no reduce of
// the same call, so no circle. Flags carry the epoch; nobody clears them.
#pragma once

#include "layout/counts.hpp"
#include "kernels/combine/copy_engine.hpp"
#include "kernels/combine/sum.hpp"

namespace deepep::kernels {

inline constexpr int kCombineThreads = 512;
inline constexpr int kReturnUnroll = 14;  // 16-byte accesses a lane has in flight when it pushes
inline constexpr int kFewRows = 512;      // up to so many rows from any rank to any other, rows travel in parts
inline constexpr int kFewItems = 360;     // as many parts as 24 SMs have warps, but for one a block that raises flags
inline constexpr int kMixedPushing = 4;   // warps that push first, in a block of 16 whose other warps sum meanwhile

/// The block's dynamic shared memory.
struct CombineShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t failed() const {              // uint32
    return layout::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  /// Sums that the block's warps have taken: uint32.
  [[nodiscard]] DEEPEP_HD int64_t taken() const { return failed() + 4; }
  /// What the asker has heard of the owners' staging: uint32, 0, kLent or kGaveUp.
  [[nodiscard]] DEEPEP_HD int64_t lent() const { return failed() + 8; }
  /// Items that each push warp has stored: uint32 [warps].
  [[nodiscard]] DEEPEP_HD int64_t progress() const { return failed() + 16; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return progress() + 4 * kCombineThreads / dev::kWarpSize; }
};

/// Into how many parts a row is cut to travel and to be summed: few rows keep all warps busy only in parts. Every rank
/// comes to the same from the same counts. Whole warps.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE layout::Parts parts_of_rows(const Group& g, const Count& count) {
  int most = 0;  // of lane s: from rank s to any other
  DEEPEP_ROLLED
  for (int d = 0; d < g.num_ranks; ++d)
    if (dev::lane() < g.num_ranks && d != dev::lane() && count(dev::lane(), d) > most) most = count(dev::lane(), d);
  const auto any_above = [&](int rows) { return dev::ballot(most > rows) != 0; };
  static_assert(layout::StagingLayout::kParts == 4);
  return layout::Parts(any_above(kFewRows) ? 1 : any_above(kFewItems / 3) ? 2 : any_above(kFewItems / 4) ? 3 : 4);
}

/// What all ranks must pass alike, in one word: row size, top-k, live ranks, and the counts of the handle. 0 is kept
/// for a rank that refuses. Whole warps.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE uint32_t digest_of(const CombineArgs& args, const Count& count) {
  using namespace dev;
  if (args.refused) return 0;
  Digest row;  // of lane s: what rank s sends
  row.add(static_cast<uint32_t>(lane()));
  DEEPEP_ROLLED
  for (int d = 0; d < args.group.num_ranks; ++d)
    if (lane() < args.group.num_ranks) row.add(static_cast<uint32_t>(count(lane(), d)));
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(args.group.live);
  digest.add(static_cast<uint32_t>(warp_sum(static_cast<int>(row.value >> 5))));  // the sum of 32 fits
  return digest.value | 1u;
}

/// One warp: this rank's digest to every peer. It says all it has to by itself, so it needs no order.
DEEPEP_DEVICE void tell_digest(const Group& g, uint32_t digest, uint32_t epoch) {
  using namespace dev;
  if (lane() < g.num_ranks && is_live(g, lane()))
    store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_digest(g.rank, epoch)),
                              pack_tagged(digest, epoch));
}

/// Whether all live ranks combine the same as this one. Whole warps.
[[nodiscard]] DEEPEP_DEVICE bool all_agree(const CombineArgs& args, uint32_t digest, uint32_t epoch,
                                           dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  bool agrees = true;
  if (lane() < g.num_ranks && is_live(g, lane())) {
    const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_digest(lane(), epoch));
    uint32_t seen = 0;
    if (!wait_tag<relaxed, sys_scope>(word, epoch, deadline, seen)) {
      note_fault(g, Phase::kReturn, 1u << lane(), epoch, unpack_tagged(load<relaxed, sys_scope>(word)).tag);
      agrees = false;
    } else if (seen != digest || args.refused) {
      note_fault(g, Phase::kDisagreement, 1u << lane(), digest, seen);
      agrees = false;
    }
  }
  return ballot(!agrees) == 0;
}

/// Waits until every owner's staging is free, a lane an owner. Whole warps: the lanes' acquires come before the whole
/// warp's stores.
[[nodiscard]] DEEPEP_DEVICE bool await_staging(const Group& g, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  bool free = true;
  if (lane() < g.num_ranks && lane() != g.rank && is_live(g, lane())) {
    const uint32_t* word = at<uint32_t>(g, g.rank, g.control.staging_free(lane()));
    // An owner that gets nothing from this rank does not wait for it, and may be further already.
    free = wait_reached<acquire, sys_scope>(word, epoch - 1, deadline);
    if (!free) note_fault(g, Phase::kStaging, 1u << lane(), epoch - 1, load<relaxed, sys_scope>(word));
  }
  sync_warp();
  return ballot(!free) == 0;
}

/// What a block does. The launch says how many blocks push, the first ones, and how many sum, the last ones. If all
/// may sum, they do if all push as well, or if rows are so few that every warp has no more than one to push; otherwise
/// those that push do nothing else.
struct CombineRole {
  int pushing;      // this block's first `pushing` warps push
  int asker;        // the warp that asks for staging; -1: none, for nothing is pushed
  int leader;       // the warp that raises flags, likewise
  bool is_single;   // no push warp has more than one item, and all sum when they are done
  bool reduces;     // the block sums: all warps, once they are done with the above
  int push_blocks;  // of this launch
  int reduce_blocks;
};

/// What this rank returns, lane r to owner r.
struct Returns {
  int32_t rows;         // so many; none to itself or to a rank that does not take part
  int32_t first_row;    // the first of them here
  int32_t first_place;  // its place in the owner's staging
};

template <class Count>
[[nodiscard]] DEEPEP_DEVICE Returns returns_of(const CombineArgs& args, const Count& count) {
  using namespace dev;
  const Group& g = args.group;
  if (lane() >= g.num_ranks || lane() == g.rank || !is_live(g, lane())) return {0, 0, 0};
  // Never past the owner's staging: a rank with another handle is told of it, and must not harm before.
  const int64_t place = layout::first_staging_row(count, lane(), g.rank);
  const int64_t room = layout::max_of(args.staging.capacity() - place, int64_t{0});
  return {static_cast<int32_t>(layout::min_of(static_cast<int64_t>(count(lane(), g.rank)), room)),
          static_cast<int32_t>(layout::first_row_of_source(count, lane(), g.rank)), static_cast<int32_t>(place)};
}

/// Calls visit(owner, row here, row in the owner's staging) for every owner that has an n-th row; `nth` may be a lane's
/// own, all lanes come along. Whole warps.
template <class Visit>
DEEPEP_DEVICE void for_each_owner(const Group& g, const Returns& returns, uint32_t nth, const Visit& visit) {
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

/// Which items a push warp returns: first, first + step, ... below `end`. Each is a part of every owner's n-th row: all
/// owners' rows side by side and in order, so that no owner's reduce waits for another's.
struct ReturnItems {
  uint32_t first;
  uint32_t step;
  uint32_t end;

  /// How many items it has.
  [[nodiscard]] DEEPEP_DEVICE uint32_t count() const { return first < end ? (end - first + step - 1) / step : 0; }
};

/// Whole warps.
[[nodiscard]] DEEPEP_DEVICE uint32_t num_return_items(const Group& g, const Returns& returns, layout::Parts parts) {
  int32_t most = 0;
  DEEPEP_ROLLED
  for (int owner = 0; owner < g.num_ranks; ++owner) most = layout::max_of(most, dev::shuffle(returns.rows, owner));
  return static_cast<uint32_t>(most) * parts.count;
}

[[nodiscard]] DEEPEP_DEVICE CombineRole role_of_block(const CombineArgs& args, uint32_t num_items) {
  using namespace dev;
  const int blocks = num_blocks();
  const int warps = num_warps();
  const bool any = num_items > 0;
  if (args.reduce_blocks == blocks && num_items <= static_cast<uint32_t>(blocks * warps)) {
    if (num_items <= static_cast<uint32_t>(blocks * (warps - 1)))
      return {warps - 1, any ? warps - 1 : -1, any ? warps - 1 : -1, true, true, blocks, blocks};
    // Not by one warp: what an asker pushes comes late, and a leader is to be done with its own before the others are.
    return {warps, 0, warps - 1, true, true, blocks, blocks};
  }
  const int mixed = (warps * kMixedPushing + 15) / 16;
  if (args.reduce_blocks == blocks && args.push_blocks == blocks)
    return {mixed, mixed, mixed, false, true, blocks, blocks};
  const bool pushes = block() < args.push_blocks;
  const int behind = pushes && any ? warps - 1 : -1;
  return {pushes ? warps - 1 : 0, behind, behind, false, !pushes, args.push_blocks, blocks - args.push_blocks};
}

[[nodiscard]] DEEPEP_DEVICE ReturnItems return_items(const CombineRole& role, uint32_t num_items, int warp) {
  return {static_cast<uint32_t>(warp * role.push_blocks + dev::block()),
          static_cast<uint32_t>(role.push_blocks * role.pushing), num_items};
}

/// What an asker tells its block.
inline constexpr uint32_t kLent = 1;
inline constexpr uint32_t kGaveUp = 0xffffffffu;

/// The asker's beginning: asks whether the owners' staging is free, and tells its block. While it waits the block's rows
/// come to the registers of those who push them.
[[nodiscard]] DEEPEP_DEVICE bool ask_for_staging(const Group& g, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const bool lent = await_staging(g, epoch, deadline);
  SharedArray<uint32_t> told(CombineShared{g.num_ranks}.lent());
  if (lane() == 0) told.set<release>(0, lent ? kLent : kGaveUp);
  return lent;
}

/// Waits for what the asker tells: it has a deadline. Whole warps.
[[nodiscard]] DEEPEP_DEVICE bool may_store(const Group& g) {
  using namespace dev;
  SharedArray<uint32_t> told(CombineShared{g.num_ranks}.lent());
  uint32_t seen = 0;
  if (lane() == 0)
    while ((seen = told.get<acquire>(0)) == 0) pause();
  sync_warp();  // the acquire comes before the whole warp's stores
  return shuffle(seen, 0) == kLent;
}

/// One part of a received row to its place in the owner's staging. One warp. The weights travel with the last part.
/// `lent`: whether it may be stored; if that is not known yet, it is asked between the loads and the stores.
DEEPEP_DEVICE void return_row(const CombineArgs& args, int owner, int64_t row, int64_t place, uint32_t part,
                              layout::Parts parts, uint32_t& lent) {
  using namespace dev;
  const Group& g = args.group;
  std::byte* area = g.heap[owner] + g.staging_offset;
  const Vec16* source = reinterpret_cast<const Vec16*>(args.x + row * args.row_bytes);
  Vec16* target = reinterpret_cast<Vec16*>(area + args.staging.row(place));
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int end = parts.begin(chunks, part + 1);
  float weight = 0.0f;
  if (parts.is_last(part) && lane() < args.num_topk) weight = load_once(args.topk_weights + row * args.num_topk + lane());
  int begin = parts.begin(chunks, part) + lane();
#pragma unroll 1
  do {  // once for a part that is empty, too: it has a flag as any other
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 v[kReturnUnroll];
#pragma unroll
    for (int u = 0; u < kReturnUnroll; ++u)
      if (u * kWarpSize < left) v[u] = load_once(source + begin + u * kWarpSize);
    if (lent == 0) lent = may_store(g) ? kLent : kGaveUp;
    if (lent == kGaveUp) return;
#pragma unroll
    for (int u = 0; u < kReturnUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(target + begin + u * kWarpSize, v[u]);
    begin += kReturnUnroll * kWarpSize;
  } while (begin < end + lane());
  if (parts.is_last(part) && lane() < args.num_topk)
    store(reinterpret_cast<float*>(area + args.staging.weights(place)) + lane(), weight);
}

/// The flags of a push block, raised by its leader; lane w speaks for warp w. A fence makes its thread wait until the
/// peers have what was stored before it. One of a warp that pushes nothing else meanwhile costs nobody anything, and
/// serves the items of all: where they are many it follows the others' progress, else it comes behind all of them, and a
/// block barrier.
DEEPEP_DEVICE void raise_flags(const CombineArgs& args, const Returns& returns, const CombineRole& role,
                               uint32_t num_items, layout::Parts parts, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  if (!may_store(g)) return;
  SharedArray<uint32_t> progress(CombineShared{g.num_ranks}.progress());
  const ReturnItems items = return_items(role, num_items, lane());
  const uint32_t total = lane() < role.pushing ? items.count() : 0;
  uint32_t raised = 0;
#pragma unroll 1
  while (ballot(raised < total) != 0) {
    uint32_t done = total;
    // Acquire: the warp's stores come before what this one does now; the fence carries them before the flags.
    if (!role.is_single && raised < total) done = progress.get<acquire>(lane());
    if (ballot(raised < done) == 0) {
      pause();
      continue;
    }
    fence<acq_rel, sys_scope>();
#pragma unroll 1
    for (; ballot(raised < done) != 0; raised += raised < done ? 1u : 0u) {
      const uint32_t item = items.first + raised * items.step;
      const uint32_t nth = raised < done ? parts.row_of(item) : 0xffffffffu;  // no owner has that
      for_each_owner(g, returns, nth, [&](int owner, int64_t, int64_t place) {
        std::byte* flag = g.heap[owner] + g.staging_offset + args.staging.flag(place, parts.part_of(item));
        store<relaxed, sys_scope>(reinterpret_cast<uint32_t*>(flag), epoch);
      });
    }
  }
}

/// return: this warp's share of the rows. False if a peer has not lent its staging. `is_followed`: by the leader.
[[nodiscard]] DEEPEP_DEVICE bool return_rows(const CombineArgs& args, const Returns& returns, const ReturnItems& items,
                                             layout::Parts parts, bool is_followed) {
  using namespace dev;
  SharedArray<uint32_t> progress(CombineShared{args.group.num_ranks}.progress());
  uint32_t lent = 0;
  uint32_t done = 0;
#pragma unroll 1
  for (uint32_t item = items.first; item < items.end && lent != kGaveUp; item += items.step) {
    const uint32_t part = parts.part_of(item);
    for_each_owner(args.group, returns, parts.row_of(item), [&](int owner, int64_t row, int64_t place) {
      if (lent != kGaveUp) return_row(args, owner, row, place, part, parts, lent);
    });
    if (!is_followed) continue;
    sync_warp();  // the warp's stores come before lane 0's release
    if (lane() == 0) progress.set<release>(warp(), ++done);
  }
  return lent != kGaveUp;
}

/// A warp's turn: a token, or a part of one, and where its rows are. The turns of a block are taken in order.
struct Turn {
  uint32_t item;    // a part of a token
  int32_t at_rank;  // of lane r: the token's row at rank r, or -1; asked for a turn ahead
};

/// `first`: where rows are few every push warp has its first turn by its number.
[[nodiscard]] DEEPEP_DEVICE Turn take_turn(const CombineArgs& args, const CombineRole& role, layout::Parts parts,
                                           bool first) {
  using namespace dev;
  const Group& g = args.group;
  SharedArray<uint32_t> taken(CombineShared{g.num_ranks}.taken());
  uint32_t n = static_cast<uint32_t>(warp());
  if (!first || !role.is_single || warp() >= role.pushing) {
    if (lane() == 0) n = taken.add(0, 1u) + static_cast<uint32_t>(role.is_single ? role.pushing : 0);
    n = shuffle(n, 0);
  }
  const int block_turn = block() - num_blocks() + role.reduce_blocks;
  Turn turn{n * static_cast<uint32_t>(role.reduce_blocks) + static_cast<uint32_t>(block_turn), -1};
  const int64_t t = parts.row_of(turn.item);
  if (t < args.num_tokens && lane() < g.num_ranks && is_live(g, lane()))
    turn.at_rank = load_once(args.send_row + t * g.num_ranks + lane());
  return turn;
}

/// reduce: this warp's turns, the first of them taken already. False if a rank disagrees or a row did not come.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE bool reduce_tokens(const CombineArgs& args, const Count& count, const CombineRole& role,
                                               Turn turn, layout::Parts parts, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const std::byte* area = g.heap[g.rank] + g.staging_offset;
  const int chunks = static_cast<int>(args.row_bytes / 16);

  // Lane r speaks for rank r: how far that rank's rows are from their place in the staging here.
  const bool speaks = lane() < g.num_ranks && is_live(g, lane());
  const int32_t to_place = speaks ? static_cast<int32_t>(layout::first_staging_row(count, g.rank, lane()) -
                                                         layout::first_row_of_source(count, g.rank, lane()))
                                  : 0;
  // Summing waits for the digests, too: rows of a rank that disagrees are not where they belong.
  bool fails = !all_agree(args, digest_of(args, count), epoch, deadline);
#pragma unroll 1
  for (;;) {
    const uint32_t t = parts.row_of(turn.item);
    if (fails || t >= args.num_tokens) break;
    const uint32_t part = parts.part_of(turn.item);
    const TokenRows rows{turn.at_rank, turn.at_rank + to_place, ballot(turn.at_rank >= 0),
                         ballot(turn.at_rank >= 0 && lane() != g.rank)};
    const Addends addends = list_addends(args, t, rows);
    const bool is_pair = addends.count == 1 || (addends.count == 2 && popcount(addends.remote) <= 1);
    const int from = parts.begin(chunks, part);
    const int end = parts.begin(chunks, part + 1);
    // What is here already comes to the registers while the peers' rows are on their way.
    Vec16 here[kPairUnroll];
    set_to_nothing(here);
    const Vec16* early = pair_of(addends).here;
    if (is_pair && early != nullptr) read_pieces(early + from + lane(), end - from - lane(), here);
    turn = take_turn(args, role, parts, false);
    bool came = true;
    if (rows.is_remote()) {
      const uint32_t* flag = reinterpret_cast<const uint32_t*>(area + args.staging.flag(rows.place, part));
      came = wait_equal<acquire, sys_scope>(flag, epoch, deadline);
      if (!came) note_fault(g, Phase::kReturn, 1u << lane(), epoch, load<relaxed, sys_scope>(flag));
    }
    fails = ballot(!came) != 0;
    if (fails) break;  // the deadline has passed: what is still missing will not be waited for again
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * args.row_bytes);
    if (is_pair)
      reduce_pair(out, pair_of(addends), from, end, here);
    else
      reduce_many(out, addends, from, end);
    if (parts.is_last(part) && args.num_topk > 0) reduce_weights(args, t, rows);
  }
  return !fails;
}

/// A combine. kCarried: the copy engine returns the rows, and all warps sum.
template <bool kCarried>
DEEPEP_DEVICE void combine(const CombineArgs& args) {
  using namespace dev;
  const Group& g = args.group;
  const CombineShared shared{g.num_ranks};
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->combine_epoch);
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> taken(shared.taken());
  SharedArray<uint32_t> told(shared.lent());
  SharedArray<uint32_t> progress(shared.progress());

  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads()) counts.set(i, load_once(args.counts + i));
  if (thread() == 0) {
    failed.set(0, 0);
    taken.set(0, 0);
    told.set(0, 0);
  }
  if (thread() < num_warps()) progress.set(thread(), 0);
  if (block() == 0) lend_staging(g, epoch - 1);
  sync_block();
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const layout::Parts parts = parts_of_rows(g, count);
  const Returns returns = returns_of(args, count);
  const uint32_t num_items = kCarried || args.refused ? 0 : num_return_items(g, returns, parts);
  const CombineRole role =
      kCarried ? CombineRole{0, -1, -1, false, true, 0, num_blocks()} : role_of_block(args, num_items);
  const bool pushes = warp() < role.pushing;
  const bool follows = kCarried && block() == 0 && warp() == 0;
  const bool is_clerk = warp() == num_warps() / 2;
  if (is_clerk && block() == 0) tell_digest(g, digest_of(args, count), epoch);
  // Before the warp's own rows, or it would wait for them.
  if (is_clerk && lane() == 0) have_read_epoch(g, &g.state->combine_epoch, epoch);

  // A warp that sums nothing before it has pushed, or raised flags, takes its turn then; one with a single item takes it
  // now, so that what it needs for its sum is on the way meanwhile.
  const bool is_early = role.reduces && (role.is_single ? pushes : warp() != role.leader && !pushes) && !follows;
  Turn turn{0, -1};
  if (is_early) turn = take_turn(args, role, parts, true);
  bool lent = true;
  if (warp() == role.asker) lent = ask_for_staging(g, epoch, deadline);
  if (pushes) lent = return_rows(args, returns, return_items(role, num_items, warp()), parts, !role.is_single) && lent;
  if constexpr (kCarried)
    if (follows) lent = follow_engine(args, count, await_staging(g, epoch, deadline), parts, epoch);
  // Whoever waits for flags waits for none of this call's sums.
  if (role.is_single && role.leader >= 0) sync_block();
  if (warp() == role.leader) raise_flags(args, returns, role, num_items, parts, epoch);
  bool summed = true;
  if (role.reduces) {
    if (!is_early) turn = take_turn(args, role, parts, true);
    summed = reduce_tokens(args, count, role, turn, parts, epoch, deadline);
  }
  if (!(lent && summed) && lane() == 0) failed.bit_or(0, 1u);
  sync_block();
  if (warp() != 0) return;
  const bool spoiled = role.reduces && is_overwritten(g);
  if (lane() != 0 || (!spoiled && failed.get(0) == 0)) return;
  if constexpr (kCarried) await_engine(args);
  hand_over_faults(g, Operation::kCombine);
}

DEEPEP_KERNEL(combine_kernel, CombineArgs, kCombineThreads) { combine<false>(args); }
DEEPEP_KERNEL(combine_carried_kernel, CombineArgs, kCombineThreads) { combine<true>(args); }

}  // namespace deepep::kernels
