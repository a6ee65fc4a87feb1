// What does not depend on the peers' counts, while those travel: where tokens go, and how many go there before
// them.
#pragma once

#include "kernels/dispatch/count.hpp"

namespace deepep::kernels {

inline constexpr int kPlaceBatch = 8;  // tokens a thread looks at together

/// Bit r: token t goes to rank r, and that concerns the role (its bit is in `wanted`).
template <DispatchMode kMode>
[[nodiscard]] DEEPEP_DEVICE uint32_t destinations_of(const DispatchArgs& args, int64_t t, uint32_t wanted) {
  const int ranks = args.group.num_ranks;
  if constexpr (finds_ranks(kMode)) return ranks_of_token(args, t) & wanted;
  uint32_t mask = 0;
  for (int r = 0; r < ranks; ++r)
    mask |= static_cast<uint32_t>(dev::load_once(args.is_token_in_rank + t * ranks + r) != 0) << r;
  return mask & wanted;
}

/// Lane r gets how many of the tokens first, first + step, ... of all lanes, below `end`, go to rank r. One
/// warp.
template <int kBatch>
[[nodiscard]] DEEPEP_DEVICE int count_tokens(const DispatchArgs& args, int64_t first, int64_t step, int64_t end,
                                             uint32_t wanted) {
  using namespace dev;
  int count = 0;
#pragma unroll 1
  for (; ballot(first < end) != 0; first += kBatch * step) {
    uint32_t goes[kBatch];  // all loaded before the first is used
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      goes[i] =
          first + i * step < end ? destinations_of<DispatchMode::kFresh>(args, first + i * step, wanted) : 0;
    for (int r = 0; r < args.group.num_ranks; ++r) {
      int with = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) with += popcount(ballot((goes[i] >> r) & 1u));
      if (lane() == r) count += with;
    }
  }
  return count;
}

/// Into shared memory: how many tokens of this warp, and of its share of those before the block, go where.
DEEPEP_DEVICE void count_earlier_tokens(const DispatchArgs& args, const DispatchRole& role,
                                        const WarpTokens& mine) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> own(shared.own());
  SharedArray<int32_t> before(shared.before());
  const uint32_t wanted = wanted_ranks(role, args.group);
  const int own_count = count_tokens<1>(args, mine.begin + lane(), kWarpSize, mine.end, wanted);
  if (lane() < ranks) own.set(warp() * ranks + lane(), own_count);
  const int earlier = count_tokens<kPlaceBatch>(args, thread(), num_threads(), role.begin, wanted);
  if (lane() < ranks) before.set(warp() * ranks + lane(), earlier);
}

/// Lane r: the first of this warp's tokens for rank r has so many of this rank's before it. One warp, behind a
/// block barrier.
[[nodiscard]] DEEPEP_DEVICE int tokens_before(const DispatchArgs& args, const WarpTokens& mine) {
  using namespace dev;
  const int ranks = args.group.num_ranks;
  const DispatchShared shared{ranks, num_warps()};
  SharedArray<int32_t> own(shared.own());
  SharedArray<int32_t> before(shared.before());
  int result = 0;
  for (int r = 0; r < ranks; ++r) {
    int share = 0;  // lane w adds what warp w has counted
    for (int w = lane(); w < num_warps(); w += kWarpSize) {
      share += before.get(w * ranks + r);
      // The warps of one token have all counted it.
      if (w < warp() - mine.part && w % mine.parts == 0) share += own.get(w * ranks + r);
    }
    const int sum = warp_sum(share);
    if (lane() == r) result = sum;
  }
  return result;
}

/// The destinations of a token, as far as they are known before its turn: for a cached call its row at rank r
/// in lane r, or -1; else whether it goes there.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE int32_t look_up_route(const DispatchArgs& args, int64_t t, bool mine) {
  if (!mine) return kCached ? -1 : 0;
  const int64_t at = t * args.group.num_ranks + dev::lane();
  return kCached ? dev::load_once(args.send_row + at) : dev::load_once(args.is_token_in_rank + at);
}

/// The way of a warp's first token, of which lane r has what concerns rank r; more tokens are looked up as they
/// come.
struct FirstToken {
  int32_t route;  // see look_up_route; found out from top-k: which of the first tokens go there, as bits
  int before;     // so many tokens of this rank go there before it; of a cached call it is in the route
};

/// Which ranks each of the tokens [begin, begin + size) goes to, into the marks; `ranks`: of lane i's token, as
/// bits. One warp.
DEEPEP_DEVICE void mark_tokens(const DispatchArgs& args, int64_t begin, int size, uint32_t ranks) {
  using namespace dev;
  const int num_ranks = args.group.num_ranks;
#pragma unroll 1
  for (int i = lane(); i < size * num_ranks + lane(); i += kWarpSize) {
    const int token = i / num_ranks;
    const uint32_t goes = shuffle(ranks, token < size ? token : 0);
    if (token < size)
      store(args.marks + begin * num_ranks + i, static_cast<uint8_t>((goes >> (i % num_ranks)) & 1u));
  }
}

/// `place_tokens` by top-k indices: local blocks mark all their tokens. Behind `count_stretches`.
[[nodiscard]] DEEPEP_DEVICE FirstToken place_by_topk(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const WarpTokens& mine = share.mine;
  const int ranks = call.g.num_ranks;
  if (mine.begin >= mine.end) return {0, 0};
  const uint32_t wanted = wanted_ranks(share.role, call.g);
  const int stretch = static_cast<int>(mine.begin / layout::kStretch);
  const int64_t begin = int64_t{stretch} * layout::kStretch;
  const uint32_t earlier = by_rank(ranks, ranks_of_tokens(args, begin, static_cast<int>(mine.begin - begin)));
  int before = popcount(earlier);
  for (int r = 0; r < ranks; ++r) {
    const int counted = stretch_sum(ranks, r, stretch);
    if (lane() == r) before += counted;
  }
  uint32_t first = 0;
#pragma unroll 1
  for (int64_t t = mine.begin; t < mine.end; t += kWarpSize) {
    const int size = static_cast<int>(layout::min_of(mine.end - t, static_cast<int64_t>(kWarpSize)));
    const uint32_t goes = ranks_of_tokens(args, t, size);
    if (share.role.local && mine.part == 0) mark_tokens(args, t, size, goes);
    if (t == mine.begin) first = by_rank(ranks, goes & wanted);
    if (!share.role.local) break;
  }
  return {static_cast<int32_t>(first), before};
}

/// Of what does not depend on the counts, what is slow: first rows, where their tokens go, and what goes before
/// them.
template <DispatchMode kMode>
[[nodiscard]] DEEPEP_DEVICE FirstToken place_tokens(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  constexpr bool kCached = kMode == DispatchMode::kCached;
  if constexpr (finds_ranks(kMode)) return place_by_topk(call, share);
  prefetch_row(call.args, share.mine);
  const bool handles = share.mine.begin < share.mine.end && ((wanted_ranks(share.role, call.g) >> lane()) & 1u);
  FirstToken first{look_up_route<kCached>(call.args, share.mine.begin, handles), 0};
  if (!kCached) {
    count_earlier_tokens(call.args, share.role, share.mine);
    sync_block();
    first.before = tokens_before(call.args, share.mine);
  }
  return first;
}

}  // namespace deepep::kernels
