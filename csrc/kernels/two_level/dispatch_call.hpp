// A two-level dispatch as its blocks see it, and where the tokens of a chunk go.
#pragma once

#include "kernels/dispatch/handle.hpp"
#include "kernels/dispatch/host_counts.hpp"
#include "kernels/dispatch/signal.hpp"
#include "kernels/dispatch/write.hpp"
#include "kernels/two_level/items.hpp"
#include "kernels/two_level/prefix.hpp"

namespace deepep::kernels {

/// Fewer than in one level: a thread has more to remember, and a chunk has 16 tokens.
inline constexpr int kTwoLevelDispatchThreads = 384;

struct TwoLevelDispatchCall {
  const TwoLevelDispatchArgs& args;
  const TwoLevelArgs& two_level;
  DispatchCall all;   // of all ranks that take part
  DispatchCall near;  // of those of this domain
};

/// The block's words behind those of one level.
[[nodiscard]] DEEPEP_HD int64_t item_words(const TwoLevelDispatchArgs& args) {
  return layout::align_up(MetadataShared{args.dispatch.group.num_ranks}.bytes(), 16);
}
[[nodiscard]] inline int64_t shared_bytes(const TwoLevelDispatchArgs& args) {
  return ItemShared{item_words(args)}.end();
}

/// A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE TwoLevelDispatchCall start(const TwoLevelDispatchArgs& args) {
  const DispatchCall all = start(args.dispatch);
  return {args, args.two_level, all, {args.dispatch, args.two_level.near, all.epoch, all.deadline}};
}

/// T of every rank: a foreign one's stands where a neighbour's has the place of its receive array.
[[nodiscard]] DEEPEP_DEVICE int64_t tokens_of(const TwoLevelDispatchCall& call, int source) {
  const int ranks = call.all.g.num_ranks;
  return dev::SharedArray<uint32_t>(MetadataShared{ranks}.slot()).get(source * layout::kSlotArrays);
}

/// Where the tokens of a chunk go; lane r holds what concerns rank r.
struct ChunkRoutes {
  ChunkTokens tokens;
  uint32_t going;     // bit i: the chunk's i-th token goes there
  int32_t first_row;  // the final row of the first that goes; the rows of the others follow

  /// The final row of token i at rank r, or -1.
  [[nodiscard]] DEEPEP_DEVICE int32_t row(int i) const {
    return ((going >> i) & 1u) ? first_row + going_before(going, i) : -1;
  }
  /// The tokens that go to one of the ranks [first, first + size), as bits. One warp.
  [[nodiscard]] DEEPEP_DEVICE uint32_t crossing(int first, int size) const {
    return dev::warp_or(dev::lane() >= first && dev::lane() < first + size ? going : 0u);
  }
};

/// Rows of one source at a rank follow each other, so the first one's is enough; a handle says the same. More
/// tokens for a rank than were posted are left out: they would run into another source's rows, or out of the
/// receive arrays. One warp.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE ChunkRoutes routes_of(const TwoLevelDispatchCall& call, const ChunkTokens& tokens) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const int ranks = call.all.g.num_ranks;
  const bool handles = lane() < ranks && is_live(call.all.g, lane());
  ChunkRoutes routes{tokens, 0, -1};
  if (!handles || tokens.begin >= tokens.end) return routes;
  SharedArray<int32_t> counts(MetadataShared{ranks}.counts());
  const auto count = [&](int s, int d) { return counts.get(s * ranks + d); };
  const auto first = static_cast<int32_t>(layout::first_row_of_source(count, call.all.g.rank, lane()));
  const int32_t end = first + count(call.all.g.rank, lane());
  if (!kCached)
    routes.first_row =
        first + load_once(call.args.before + tokens.begin / layout::kChunkRecords * ranks + lane());
#pragma unroll 1
  for (int i = 0; i < tokens.size(); ++i) {
    const int64_t at = (tokens.begin + i) * ranks + lane();
    const int32_t kept = kCached ? load_once(args.send_row + at) : -1;
    const bool goes = kCached ? kept >= 0 : load_once(args.is_token_in_rank + at) != 0;
    if (!goes) continue;
    if (kCached && routes.going == 0) routes.first_row = kept;
    routes.going |= 1u << i;
  }
  const uint32_t lawful = first_bits(routes.going, layout::max_of(end - routes.first_row, 0));
  if (lawful != routes.going) {
    note_fault(call.all.g, Phase::kDisagreement, 1u << call.all.g.rank, static_cast<uint32_t>(end),
               static_cast<uint32_t>(routes.first_row));
    SharedArray<uint32_t>(MetadataShared{ranks}.failed())
        .bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    routes.going = lawful;
  }
  return routes;
}

}  // namespace deepep::kernels
