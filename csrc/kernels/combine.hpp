// High-throughput combine: rows go back to their tokens' owner and are summed there as they arrive.
//
//   return    push blocks send each received row to its owner's staging, and raise that row's flag behind it
//   reduce    reduce blocks take their tokens in order: for each, wait for the flags of its remote rows, sum
//             bias and rows in rank order in fp32, round once, write. A rank's own row is read where it lies.
//   free      the last block to leave tells every peer that this rank's staging may be written again
//
// Who waits for whom: a push block waits until the owner has freed its staging of the previous combine (told at
// the end of that combine, so normally long ago); a reduce block waits for flags. Pushing waits for no reduce of
// the same call, so no circle. Flags carry the epoch; nobody clears them.
#pragma once

#include "core/counts.hpp"
#include "kernels/group.hpp"

namespace deepep::kernels {

inline constexpr int kReduceUnroll = 2;  // 16-byte pieces of the output a lane holds at once

/// The block's dynamic shared memory.
struct CombineShared {
  int num_ranks;

  [[nodiscard]] DEEPEP_HD int64_t counts() const { return 0; }  // int32 [R, R]
  [[nodiscard]] DEEPEP_HD int64_t failed() const {              // uint32
    return core::align_up(4 * static_cast<int64_t>(num_ranks) * num_ranks, 16);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return failed() + 16; }
};

[[nodiscard]] DEEPEP_DEVICE core::StagingLayout staging_of(const CombineArgs& args) {
  return {args.group.staging_bytes, args.row_bytes, args.num_topk};
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
  return failed.get(0) == 0;
}

/// One received row, with its weights, to its place in the owner's staging, and its flag behind it. One warp.
DEEPEP_DEVICE void return_row(const CombineArgs& args, int owner, int64_t row, int64_t place, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  const core::StagingLayout staging = staging_of(args);
  std::byte* area = g.heap[owner] + g.staging_offset;
  const Vec16* source = reinterpret_cast<const Vec16*>(args.x + row * args.row_bytes);
  Vec16* target = reinterpret_cast<Vec16*>(area + staging.row(place));
  const int64_t chunks = args.row_bytes / 16;
  constexpr int kUnroll = 8;
  for (int64_t begin = 0; begin < chunks; begin += kUnroll * kWarpSize) {
    Vec16 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t c = begin + u * kWarpSize + lane();
      if (c < chunks) v[u] = load_once(source + c);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t c = begin + u * kWarpSize + lane();
      if (c < chunks) store_streaming(target + c, v[u]);
    }
  }
  if (lane() < args.num_topk)
    store(reinterpret_cast<float*>(area + staging.row(place) + args.row_bytes) + lane(),
          load_once(args.topk_weights + row * args.num_topk + lane()));
  sync_warp();  // the warp's stores come before lane 0's release, which carries them along
  if (lane() == 0) store<release, sys_scope>(reinterpret_cast<uint32_t*>(area + staging.flag(place)), epoch);
}

/// return: all owners' rows side by side and in order, so that no owner's reduce waits for another's rows.
template <class Count>
DEEPEP_DEVICE void return_rows(const CombineArgs& args, const Count& count, uint32_t epoch) {
  using namespace dev;
  const Group& g = args.group;
  int64_t most = 0;
  for (int owner = 0; owner < g.num_ranks; ++owner)
    if (owner != g.rank && count(owner, g.rank) > most) most = count(owner, g.rank);
  const int64_t step = static_cast<int64_t>(args.push_blocks) * num_warps();
  for (int64_t i = static_cast<int64_t>(warp()) * args.push_blocks + block(); i < most; i += step) {
    for (int d = 1; d < g.num_ranks; ++d) {
      const int owner = (g.rank + d) % g.num_ranks;
      if (!is_live(g, owner) || i >= count(owner, g.rank)) continue;
      return_row(args, owner, core::first_row_of_source(count, owner, g.rank) + i,
                 core::first_staging_row(count, owner, g.rank) + i, epoch);
    }
  }
}

/// Adds eight bf16 to eight fp32 sums; the first row starts them, so that -0.0 alone stays -0.0.
DEEPEP_DEVICE void accumulate(float (&sum)[8], const dev::Vec16& v, bool first) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = dev::bf16_low(v.w[i]);
    const float high = dev::bf16_high(v.w[i]);
    sum[2 * i] = first ? low : dev::add_rounded(sum[2 * i], low);
    sum[2 * i + 1] = first ? high : dev::add_rounded(sum[2 * i + 1], high);
  }
}

/// reduce, one token by one warp. `row` of lane r: where rank r's row lies, or 0 if it has none.
DEEPEP_DEVICE void reduce_token(const CombineArgs& args, int64_t t, uint64_t row, uint32_t ranks, uint32_t remote) {
  using namespace dev;
  const int64_t chunks = args.row_bytes / 16;
  for (int64_t begin = 0; begin < chunks; begin += kReduceUnroll * kWarpSize) {
    float sum[kReduceUnroll][8] = {};
    bool first = true;
    const auto add = [&](const Vec16* source, bool is_remote) {
      Vec16 v[kReduceUnroll];
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u) {
        const int64_t c = begin + u * kWarpSize + lane();
        // What peers wrote during this kernel is no constant: a plain load, behind the flag's acquire.
        if (c < chunks) v[u] = is_remote ? load(source + c) : load_once(source + c);
      }
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u)
        if (begin + u * kWarpSize + lane() < chunks) accumulate(sum[u], v[u], first);
      first = false;
    };
    for (int b = 0; b < 2; ++b)
      if (args.bias[b] != nullptr) add(reinterpret_cast<const Vec16*>(args.bias[b] + t * args.row_bytes), false);
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
      const int r = lowest_bit(left);
      add(reinterpret_cast<const Vec16*>(shuffle(row, r)), (remote >> r) & 1u);
    }
#pragma unroll
    for (int u = 0; u < kReduceUnroll; ++u) {
      const int64_t c = begin + u * kWarpSize + lane();
      if (c >= chunks) continue;
      Vec16 packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) packed.w[i] = pack_bf16(sum[u][2 * i], sum[u][2 * i + 1]);
      store_streaming(reinterpret_cast<Vec16*>(args.out + t * args.row_bytes) + c, packed);
    }
  }
}

/// reduce: the warps of the reduce blocks take tokens in order, as the peers send them.
template <class Count>
DEEPEP_DEVICE void reduce_tokens(const CombineArgs& args, const Count& count, uint32_t epoch,
                                 dev::Deadline deadline) {
  using namespace dev;
  const Group& g = args.group;
  const core::StagingLayout staging = staging_of(args);
  const std::byte* area = g.heap[g.rank] + g.staging_offset;
  SharedArray<uint32_t> failed(CombineShared{g.num_ranks}.failed());
  const int part = block() - (num_blocks() - args.reduce_blocks);
  const int64_t step = static_cast<int64_t>(args.reduce_blocks) * num_warps();

  // Lane r speaks for rank r: where that rank's rows for this one start, there and in the staging here.
  const bool speaks = lane() < g.num_ranks && is_live(g, lane());
  const int64_t first_row = speaks ? core::first_row_of_source(count, g.rank, lane()) : 0;
  const int64_t first_place = speaks ? core::first_staging_row(count, g.rank, lane()) : 0;
  bool arriving = true;  // false once a row did not come in time: do not wait out the deadline again
  for (int64_t t = static_cast<int64_t>(warp()) * args.reduce_blocks + part; t < args.num_tokens; t += step) {
    const int32_t at_rank = speaks ? load_once(args.send_row + t * g.num_ranks + lane()) : -1;
    const bool has = at_rank >= 0;
    const bool is_remote = has && lane() != g.rank;
    const int64_t place = first_place + at_rank - first_row;
    bool here = true;
    if (is_remote && arriving) {
      const uint32_t* flag = reinterpret_cast<const uint32_t*>(area + staging.flag(place));
      here = wait_equal<acquire, sys_scope>(flag, epoch, deadline);
      if (!here) note_fault(g, Phase::kReturn, 1u << lane(), epoch, load<relaxed, sys_scope>(flag));
    }
    const uint32_t ranks = ballot(has);
    const uint32_t remote = ballot(is_remote);
    arriving = arriving && ballot(!here) == 0;  // also: the lanes' acquires come before the warp's reads
    if (!arriving) break;
    const std::byte* row = is_remote ? area + staging.row(place) : args.x + at_rank * args.row_bytes;
    reduce_token(args, t, has ? reinterpret_cast<uint64_t>(row) : 0, ranks, remote);
    if (args.num_topk == 0) continue;
    float weight = 0.0f;  // of top-k entry `lane`
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
      const int r = lowest_bit(left);
      const bool from_peer = (remote >> r) & 1u;
      const int64_t local_row = shuffle(at_rank, r);
      const uint64_t peer_row = shuffle(reinterpret_cast<uint64_t>(row), r);
      if (lane() >= args.num_topk) continue;
      weight = add_rounded(
          weight, from_peer ? load(reinterpret_cast<const float*>(peer_row + args.row_bytes) + lane())
                            : load_once(args.topk_weights + local_row * args.num_topk + lane()));
    }
    if (lane() < args.num_topk) store(args.out_weights + t * args.num_topk + lane(), weight);
  }
}

/// free: this rank has read all of its staging. Every block's reads come before its arrival (acq_rel) and the
/// last block's release; so the peers' next writes come after all of them.
DEEPEP_DEVICE void free_staging(const Group& g, uint32_t epoch) {
  using namespace dev;
  SharedArray<uint32_t> last(CombineShared{g.num_ranks}.failed());
  sync_block();
  if (thread() == 0)
    last.set(0, fetch_add<acq_rel, gpu_scope>(&g.state->blocks_reduced, 1u) + 1 ==
                    static_cast<uint32_t>(num_blocks()));
  sync_block();
  if (last.get(0) == 0) return;
  if (thread() == 0) store(&g.state->blocks_reduced, 0u);
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads()) {
    if (peer == g.rank || !is_live(g, peer)) continue;
    store<release, sys_scope>(at<uint32_t>(g, peer, g.control.staging_free(g.rank)), epoch);
  }
}

DEEPEP_KERNEL(combine_kernel, CombineArgs, kThreads) {
  using namespace dev;
  const Group& g = args.group;
  const CombineShared shared{g.num_ranks};
  const Deadline deadline = Deadline::in(g.timeout_ns);
  const uint32_t epoch = load(&g.state->combine_epoch) + 1;
  SharedArray<int32_t> counts(shared.counts());
  for (int i = thread(); i < g.num_ranks * g.num_ranks; i += num_threads()) counts.set(i, load_once(args.counts + i));
  if (thread() == 0) SharedArray<uint32_t>(shared.failed()).set(0, 0);
  sync_block();
  const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };

  if (block() < args.push_blocks && await_staging(args, epoch, deadline)) return_rows(args, count, epoch);
  if (block() >= num_blocks() - args.reduce_blocks) reduce_tokens(args, count, epoch, deadline);
  free_staging(g, epoch);
  leave(g, Operation::kCombine, &g.state->combine_epoch);
}

}  // namespace deepep::kernels
