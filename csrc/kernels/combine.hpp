// High-throughput combine: rows go back to their tokens' owner and are summed there as they arrive.
//
//   return    push blocks send each received row to its owner's staging; behind the rows, a warp of each raises flags
//   reduce    reduce blocks take their tokens in order: for each, wait for the flags of its remote rows, sum
//             bias and rows in rank order in fp32, round once, write. A rank's own row is read where it lies.
//   lend      at the start of this rank's next dispatch or combine, the peers hear that its staging may be written
//             again: the kernel that read it has ended by then
//
// Who waits for whom: a push block waits until the owner has lent its staging anew (normally told by the dispatch
// in between, so long ago); a reduce block waits for flags. Pushing waits for no reduce of
// the same call, so no circle. Flags carry the epoch; nobody clears them.
#pragma once

#include "core/counts.hpp"
#include "kernels/group.hpp"

namespace deepep::kernels {

inline constexpr int kCombineThreads = 512;
inline constexpr int kReturnUnroll = 14;  // 16-byte accesses a lane has in flight when it pushes
inline constexpr int kPairUnroll = 4;     // the same of each of two addends
inline constexpr int kManyUnroll = 4;     // the same where sums of more are kept
inline constexpr int kFewRows = 512;      // up to so many rows from any rank to any other, rows travel in parts

/// The block's dynamic shared memory.
struct CombineShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t failed() const {              // uint32
    return core::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  /// Items that each push warp has stored: uint32 [warps].
  [[nodiscard]] DEEPEP_HD int64_t progress() const { return failed() + 16; }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return progress() + 4 * kCombineThreads / dev::kWarpSize; }
};

[[nodiscard]] DEEPEP_DEVICE core::StagingLayout staging_of(const CombineArgs& args) {
  return {args.group.staging_bytes, args.row_bytes, args.num_topk};
}

/// Into how many parts a row is cut to travel and to be summed: few rows keep all warps busy only in parts. Every rank
/// comes to the same from the same counts. Whole warps.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE int parts_of_rows(const Group& g, const Count& count) {
  bool many = false;
  for (int d = 0; d < g.num_ranks; ++d)
    many = many || (dev::lane() < g.num_ranks && count(dev::lane(), d) > kFewRows);
  return dev::ballot(many) != 0 ? 1 : core::StagingLayout::kParts;
}

/// What all ranks must pass alike, in one word: row size, top-k, live ranks, and the counts of the handle. 0 is kept
/// for a rank that refuses.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE uint32_t digest_of(const CombineArgs& args, const Count& count) {
  if (args.refused) return 0;
  Digest digest;
  digest.add(static_cast<uint32_t>(args.row_bytes));
  digest.add(static_cast<uint32_t>(args.num_topk));
  digest.add(args.group.live);
  for (int s = 0; s < args.group.num_ranks; ++s)
    for (int d = 0; d < args.group.num_ranks; ++d) digest.add(static_cast<uint32_t>(count(s, d)));
  return digest.value | 1u;
}

/// One warp: this rank's digest to every peer. It says all it has to by itself, so it needs no order.
template <class Count>
DEEPEP_DEVICE void tell_digest(const CombineArgs& args, const Count& count, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  const uint32_t digest = digest_of(args, count);
  if (lane() < g.num_ranks && is_live(g, lane()))
    store<relaxed, sys_scope>(at<uint64_t>(g, lane(), g.control.combine_digest(g.rank, epoch)),
                              pack_tagged(digest, epoch));
}

/// Whether all live ranks combine the same as this one. Whole block; the same answer on all threads.
template <class Count>
[[nodiscard]] DEEPEP_DEVICE bool all_agree(const CombineArgs& args, const Count& count, uint32_t epoch,
                                           dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  SharedArray<uint32_t> failed(CombineShared{g.num_ranks}.failed());
  if (warp() == 0 && lane() < g.num_ranks && is_live(g, lane())) {
    const uint64_t* word = at<uint64_t>(g, g.rank, g.control.combine_digest(lane(), epoch));
    uint32_t seen = 0;
    const uint32_t expected = digest_of(args, count);
    if (!wait_tag<relaxed, sys_scope>(word, epoch, deadline, seen)) {
      note_fault(g, Phase::kReturn, 1u << lane(), epoch, unpack_tagged(load<relaxed, sys_scope>(word)).tag);
      failed.bit_or(0, static_cast<uint32_t>(Phase::kReturn));
    } else if (seen != expected || args.refused) {
      note_fault(g, Phase::kDisagreement, 1u << lane(), expected, seen);
      failed.bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    }
  }
  sync_block();
  const bool agree = failed.get(0) == 0;
  sync_block();
  return agree;
}

/// Waits until every owner's staging is free: a thread an owner. False, on all threads, if one is not.
[[nodiscard]] DEEPEP_DEVICE bool await_staging(const CombineArgs& args, uint32_t epoch, dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  SharedArray<uint32_t> failed(CombineShared{g.num_ranks}.failed());
  for (int owner = thread(); owner < g.num_ranks; owner += num_threads()) {
    if (owner == g.rank || !is_live(g, owner)) continue;
    const uint32_t* free = at<uint32_t>(g, g.rank, g.control.staging_free(owner));
    // An owner that gets nothing from this rank does not wait for it, and may be further already.
    if (!wait_reached<acquire, sys_scope>(free, epoch - 1, deadline)) {
      note_fault(g, Phase::kStaging, 1u << owner, epoch - 1, load<relaxed, sys_scope>(free));
      failed.bit_or(0, 1u);
    }
  }
  sync_block();
  const bool all_free = failed.get(0) == 0;
  sync_block();  // all have read it, before one that is ahead of the others misses a row and sets it again
  return all_free;
}

/// Which rows a push warp returns: item i, i + step, ... below `end`. Item i is part i % parts of the (i / parts)-th
/// row of every owner: all owners' rows side by side and in order, so that no owner's reduce waits for another's.
struct ReturnItems {
  int64_t first;
  int64_t step;
  int64_t end;

  /// How many items the warp has.
  [[nodiscard]] DEEPEP_DEVICE int count() const {
    return first < end ? static_cast<int>((end - first + step - 1) / step) : 0;
  }
};

/// The last warp of a push block raises flags for the others.
[[nodiscard]] DEEPEP_DEVICE int num_pushing_warps() { return dev::num_warps() - 1; }

template <class Count>
[[nodiscard]] DEEPEP_DEVICE ReturnItems return_items(const CombineArgs& args, const Count& count, int parts, int warp) {
  const Group& g = args.group;
  int64_t most = 0;
  for (int owner = 0; owner < g.num_ranks; ++owner)
    if (owner != g.rank && count(owner, g.rank) > most) most = count(owner, g.rank);
  return {static_cast<int64_t>(warp) * args.push_blocks + dev::block(),
          static_cast<int64_t>(args.push_blocks) * num_pushing_warps(), most * parts};
}

/// Calls visit(owner, row here, row in the owner's staging) for every owner that has an n-th row.
template <class Count, class Visit>
DEEPEP_DEVICE void for_each_owner(const CombineArgs& args, const Count& count, int64_t nth, const Visit& visit) {
  const Group& g = args.group;
  for (int d = 1; d < g.num_ranks; ++d) {
    const int owner = (g.rank + d) % g.num_ranks;
    if (!is_live(g, owner) || nth >= count(owner, g.rank)) continue;
    const int64_t place = core::first_staging_row(count, owner, g.rank) + nth;
    // Never past the owner's staging: a rank with another handle is told of it, and must not harm before.
    if (place < staging_of(args).capacity()) visit(owner, core::first_row_of_source(count, owner, g.rank) + nth, place);
  }
}

/// Asks for the rows that this block's warps will read first.
template <class Count>
DEEPEP_DEVICE void prefetch_rows(const CombineArgs& args, const Count& count, int parts) {
  using namespace dev;
  if (warp() >= num_pushing_warps()) return;
  const ReturnItems items = return_items(args, count, parts, warp());
  if (items.first >= items.end) return;
  const int lines = static_cast<int>(args.row_bytes / core::kLine);
  const int part = static_cast<int>(items.first % parts);
  for_each_owner(args, count, items.first / parts, [&](int, int64_t row, int64_t) {
    for (int line = lines * part / parts + lane(); line < lines * (part + 1) / parts; line += kWarpSize)
      prefetch(args.x + row * args.row_bytes + line * core::kLine);
  });
}

/// One part of a received row to its place in the owner's staging. One warp. The weights travel with the last part.
DEEPEP_DEVICE void return_row(const CombineArgs& args, int owner, int64_t row, int64_t place, int part, int parts) {
  using namespace dev;
  const Group& g = args.group;
  const core::StagingLayout staging = staging_of(args);
  std::byte* area = g.heap[owner] + g.staging_offset;
  const Vec16* source = reinterpret_cast<const Vec16*>(args.x + row * args.row_bytes);
  Vec16* target = reinterpret_cast<Vec16*>(area + staging.row(place));
  const int chunks = static_cast<int>(args.row_bytes / 16);
  const int end = chunks * (part + 1) / parts;
#pragma unroll 1
  for (int begin = chunks * part / parts + lane(); begin < end + lane(); begin += kReturnUnroll * kWarpSize) {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 v[kReturnUnroll];
#pragma unroll
    for (int u = 0; u < kReturnUnroll; ++u)
      if (u * kWarpSize < left) v[u] = load_once(source + begin + u * kWarpSize);
#pragma unroll
    for (int u = 0; u < kReturnUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(target + begin + u * kWarpSize, v[u]);
  }
  if (part == parts - 1 && lane() < args.num_topk)
    store(reinterpret_cast<float*>(area + staging.row(place) + args.row_bytes) + lane(),
          load_once(args.topk_weights + row * args.num_topk + lane()));
}

/// The flags of a push block, raised by its last warp; lane w follows warp w's progress. A release makes its thread
/// wait until the peers have what was stored before it: here that costs no pushing warp anything, and one wait
/// serves the items of all of them.
template <class Count>
DEEPEP_DEVICE void raise_flags(const CombineArgs& args, const Count& count, int parts, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  const core::StagingLayout staging = staging_of(args);
  SharedArray<uint32_t> progress(CombineShared{g.num_ranks}.progress());
  const bool follows = lane() < num_pushing_warps();
  const ReturnItems items = return_items(args, count, parts, lane());
  const int total = follows ? items.count() : 0;
  int raised = 0;
  while (ballot(raised < total) != 0) {
    // Acquire: the warp's stores come before what this one does now; the fence carries them before the flags.
    const int done = follows ? static_cast<int>(progress.get<acquire>(lane())) : 0;
    if (ballot(raised < done) == 0) {
      pause();
      continue;
    }
    fence<acq_rel, sys_scope>();
    for (; raised < done; ++raised) {
      const int64_t item = items.first + raised * items.step;
      for_each_owner(args, count, item / parts, [&](int owner, int64_t, int64_t place) {
        std::byte* flag = g.heap[owner] + g.staging_offset + staging.flag(place, static_cast<int>(item % parts));
        store<relaxed, sys_scope>(reinterpret_cast<uint32_t*>(flag), epoch);
      });
    }
    sync_warp();
  }
}

/// return: this block's share of the rows, and their flags.
template <class Count>
DEEPEP_DEVICE void return_rows(const CombineArgs& args, const Count& count, int parts, uint32_t epoch) {
  using namespace dev;
  if (warp() == num_pushing_warps()) {
    raise_flags(args, count, parts, epoch);
    return;
  }
  SharedArray<uint32_t> progress(CombineShared{args.group.num_ranks}.progress());
  const ReturnItems items = return_items(args, count, parts, warp());
  uint32_t done = 0;
  for (int64_t item = items.first; item < items.end; item += items.step) {
    for_each_owner(args, count, item / parts, [&](int owner, int64_t row, int64_t place) {
      return_row(args, owner, row, place, static_cast<int>(item % parts), parts);
    });
    sync_warp();  // the warp's stores come before lane 0's release
    if (lane() == 0) progress.set<release>(warp(), ++done);
  }
}

/// The addends of a token in the order of their addition: biases, then rows by rank. Lane i holds the i-th one's
/// address. A peer's row was written while this kernel ran: all are read plainly, behind the flags.
struct Addends {
  uint64_t address;
  int count;
};

template <int kPieces>
DEEPEP_DEVICE void read_addend(const Addends& addends, int i, int begin, int left, dev::Vec16 (&v)[kPieces]) {
  using namespace dev;
  const Vec16* source = reinterpret_cast<const Vec16*>(shuffle(addends.address, i)) + begin;
#pragma unroll
  for (int u = 0; u < kPieces; ++u)
    if (u * kWarpSize < left) v[u] = load_streaming(source + u * kWarpSize);
}

/// Eight sums in fp32. The first addend starts them, so that -0.0 alone stays -0.0; the others are added.
template <bool kFirst>
DEEPEP_DEVICE void accumulate(float (&sum)[8], const dev::Vec16& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = dev::bf16_low(v.w[i]);
    const float high = dev::bf16_high(v.w[i]);
    sum[2 * i] = kFirst ? low : dev::add_rounded(sum[2 * i], low);
    sum[2 * i + 1] = kFirst ? high : dev::add_rounded(sum[2 * i + 1], high);
  }
}

[[nodiscard]] DEEPEP_DEVICE dev::Vec16 round_sums(const float (&sum)[8]) {
  dev::Vec16 packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.w[i] = dev::pack_bf16(sum[2 * i], sum[2 * i + 1]);
  return packed;
}

/// One part of one token by one warp, for one or two addends: all that is in flight is rows, so more of them.
/// The part's 16-byte pieces are [from, end) of the row.
DEEPEP_DEVICE void reduce_pair(dev::Vec16* out, const Addends& addends, int from, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane(); begin < end + lane(); begin += kPairUnroll * kWarpSize) {
    const int left = end - begin;  // this lane's pieces are those u with u * kWarpSize < left
    Vec16 even[kPairUnroll], odd[kPairUnroll];
    read_addend(addends, 0, begin, left, even);
    if (addends.count == 2) read_addend(addends, 1, begin, left, odd);
#pragma unroll
    for (int u = 0; u < kPairUnroll; ++u) {
      if (u * kWarpSize >= left) continue;
      float sum[8];
      accumulate<true>(sum, even[u]);
      if (addends.count == 2) accumulate<false>(sum, odd[u]);
      store_streaming(out + begin + u * kWarpSize, round_sums(sum));
    }
  }
}

/// The same for any number of addends, none included. Two are on their way at a time.
DEEPEP_DEVICE void reduce_many(dev::Vec16* out, const Addends& addends, int from, int end) {
  using namespace dev;
#pragma unroll 1
  for (int begin = from + lane(); begin < end + lane(); begin += kManyUnroll * kWarpSize) {
    const int left = end - begin;
    float sum[kManyUnroll][8] = {};
    Vec16 even[kManyUnroll], odd[kManyUnroll];
#pragma unroll 1
    for (int i = 0; i < addends.count; i += 2) {
      const bool two = i + 1 < addends.count;
      read_addend(addends, i, begin, left, even);
      if (two) read_addend(addends, i + 1, begin, left, odd);
#pragma unroll
      for (int u = 0; u < kManyUnroll; ++u) {
        if (u * kWarpSize >= left) continue;
        if (i == 0)
          accumulate<true>(sum[u], even[u]);
        else
          accumulate<false>(sum[u], even[u]);
        if (two) accumulate<false>(sum[u], odd[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kManyUnroll; ++u)
      if (u * kWarpSize < left) store_streaming(out + begin + u * kWarpSize, round_sums(sum[u]));
  }
}

/// Where one token's rows lie; lane r speaks for rank r.
struct TokenRows {
  uint64_t row;     // of rank r, or 0
  int32_t at_rank;  // its number in rank r's output, or -1
  uint32_t ranks;   // the ranks that have one, as bits
  uint32_t remote;  // those of them that are peers
};

/// The token's rows as a list: lane i gets the i-th rank's, in rank order, behind the biases.
[[nodiscard]] DEEPEP_DEVICE Addends list_addends(const CombineArgs& args, int64_t t, const TokenRows& rows) {
  using namespace dev;
  Addends addends{0, 0};
  for (int b = 0; b < 2; ++b) {
    if (args.bias[b] == nullptr) continue;
    if (lane() == addends.count) addends.address = reinterpret_cast<uint64_t>(args.bias[b] + t * args.row_bytes);
    ++addends.count;
  }
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int r = lowest_bit(left);
    const uint64_t address = shuffle(rows.row, r);
    if (lane() == addends.count) addends.address = address;
    ++addends.count;
  }
  return addends;
}

/// Weights of token t, each entry the sum over ranks, ascending. Lane k holds entry k.
DEEPEP_DEVICE void reduce_weights(const CombineArgs& args, int64_t t, const TokenRows& rows) {
  using namespace dev;
  float weight = 0.0f;
  for (uint32_t left = rows.ranks; left != 0; left &= left - 1) {
    const int r = lowest_bit(left);
    const int64_t local_row = shuffle(rows.at_rank, r);
    const uint64_t peer_row = shuffle(rows.row, r);
    if (lane() >= args.num_topk) continue;
    weight = add_rounded(weight, (rows.remote >> r) & 1u
                                     ? load(reinterpret_cast<const float*>(peer_row + args.row_bytes) + lane())
                                     : load_once(args.topk_weights + local_row * args.num_topk + lane()));
  }
  if (lane() < args.num_topk) store(args.out_weights + t * args.num_topk + lane(), weight);
}

/// reduce: the warps of the reduce blocks take tokens, or parts of them, in order, as the peers send them.
template <class Count>
DEEPEP_DEVICE void reduce_tokens(const CombineArgs& args, const Count& count, int parts, uint32_t epoch,
                                 dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const core::StagingLayout staging = staging_of(args);
  const std::byte* area = g.heap[g.rank] + g.staging_offset;
  SharedArray<uint32_t> failed(CombineShared{g.num_ranks}.failed());
  const int first_block = num_blocks() - args.reduce_blocks;
  const int64_t step = static_cast<int64_t>(args.reduce_blocks) * num_warps();
  const int chunks = static_cast<int>(args.row_bytes / 16);

  // Lane r speaks for rank r: where that rank's rows for this one start, there and in the staging here.
  const bool speaks = lane() < g.num_ranks && is_live(g, lane());
  const int64_t first_row = speaks ? core::first_row_of_source(count, g.rank, lane()) : 0;
  const int64_t first_place = speaks ? core::first_staging_row(count, g.rank, lane()) : 0;
  const int64_t begin = static_cast<int64_t>(warp()) * args.reduce_blocks + block() - first_block;
  for (int64_t i = begin; i < args.num_tokens * parts; i += step) {
    const int64_t t = i / parts;
    const int part = static_cast<int>(i % parts);
    const bool is_last = part == parts - 1;
    TokenRows rows;
    rows.at_rank = speaks ? load_once(args.send_row + t * g.num_ranks + lane()) : -1;
    const bool is_remote = rows.at_rank >= 0 && lane() != g.rank;
    const int64_t place = first_place + rows.at_rank - first_row;
    bool here = true;
    if (is_remote) {
      const uint32_t* flag = reinterpret_cast<const uint32_t*>(area + staging.flag(place, part));
      here = wait_equal<acquire, sys_scope>(flag, epoch, deadline);
      if (!here) note_fault(g, Phase::kReturn, 1u << lane(), epoch, load<relaxed, sys_scope>(flag));
    }
    rows.ranks = ballot(rows.at_rank >= 0);
    rows.remote = ballot(is_remote);
    const std::byte* row = is_remote ? area + staging.row(place) : args.x + rows.at_rank * args.row_bytes;
    rows.row = rows.at_rank >= 0 ? reinterpret_cast<uint64_t>(row) : 0;
    if (ballot(!here) != 0) {
      if (lane() == 0) failed.bit_or(0, 1u);
      break;  // the deadline has passed: what is still missing will not be waited for again
    }
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    const Addends addends = list_addends(args, t, rows);
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * args.row_bytes);
    const int from = chunks * part / parts;
    const int end = chunks * (part + 1) / parts;
    if (addends.count == 1 || addends.count == 2)
      reduce_pair(out, addends, from, end);
    else
      reduce_many(out, addends, from, end);
    if (is_last && args.num_topk > 0) reduce_weights(args, t, rows);
  }
}

DEEPEP_KERNEL(combine_kernel, CombineArgs, kCombineThreads) {
  using namespace dev;
  const Group& g = args.group;
  const CombineShared shared{g.num_ranks};
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = next_epoch(&g.state->combine_epoch);
  SharedArray<int32_t> counts(shared.counts());
  SharedArray<uint32_t> failed(shared.failed());
  SharedArray<uint32_t> progress(shared.progress());
  const bool pushes = block() < args.push_blocks;
  const bool reduces = block() >= num_blocks() - args.reduce_blocks;

  if (block() == 0) lend_staging(g, epoch - 1);
  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads()) counts.set(i, load_once(args.counts + i));
  if (thread() == 0) failed.set(0, 0);
  if (thread() < num_warps()) progress.set(thread(), 0);
  sync_block();
  if (thread() == num_threads() - 1) have_read_epoch(g, &g.state->combine_epoch, epoch);
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
  const int parts = parts_of_rows(g, count);

  if (block() == 0 && warp() == num_warps() - 1) tell_digest(args, count, epoch);
  if (pushes && !args.refused) {
    prefetch_rows(args, count, parts);
    if (await_staging(args, epoch, deadline)) return_rows(args, count, parts, epoch);
  }
  // Summing waits for the digests too: rows of a rank that disagrees are not where they belong.
  if (reduces && all_agree(args, count, epoch, deadline)) reduce_tokens(args, count, parts, epoch, deadline);
  sync_block();
  if (thread() == 0 && failed.get(0) != 0) hand_over_faults(g, Operation::kCombine);
}

}  // namespace deepep::kernels
