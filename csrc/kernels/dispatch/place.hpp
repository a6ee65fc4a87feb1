// What does not depend on the peers' counts, while those travel: where tokens go, and how many go there before
// them.
#pragma once

#include "kernels/dispatch/call.hpp"

namespace deepep::kernels {

inline constexpr int kPlaceBatch = 8;  // tokens a thread looks at together

/// Bit r: token t goes to rank r, and that concerns the role (its bit is in `wanted`).
[[nodiscard]] DEEPEP_DEVICE uint32_t destinations_of(const DispatchArgs& args, int64_t t, uint32_t wanted) {
  const int ranks = args.group.num_ranks;
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
      goes[i] = first + i * step < end ? destinations_of(args, first + i * step, wanted) : 0;
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

/// Brings the warp's first row to the cache while the metadata travels.
DEEPEP_DEVICE void prefetch_row(const DispatchArgs& args, const WarpTokens& mine) {
  if (mine.begin >= mine.end) return;
  const int lines = static_cast<int>(args.row_bytes / layout::kLine);
  const int end = lines * (mine.part + 1) / mine.parts;
  for (int line = lines * mine.part / mine.parts + dev::lane(); line < end; line += dev::kWarpSize)
    dev::prefetch(args.x + mine.begin * args.row_bytes + line * layout::kLine);
}

/// The way of a warp's first token, of which lane r has what concerns rank r; more tokens are looked up as they
/// come.
struct FirstToken {
  int32_t route;  // see look_up_route
  int before;     // so many tokens of this rank go there before it; of a cached call it is in the route
};

/// Of what does not depend on the counts, what is slow: first rows, where their tokens go, and what goes before
/// them.
template <DispatchMode kMode>
[[nodiscard]] DEEPEP_DEVICE FirstToken place_tokens(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  constexpr bool kCached = kMode == DispatchMode::kCached;
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
