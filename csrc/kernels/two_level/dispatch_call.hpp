// A two-level dispatch as its blocks see it, and where the tokens of a chunk go.
#pragma once

#include "kernels/dispatch/handle.hpp"
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
  const AllRanks& all;
  DispatchCall near;  // of this domain's ranks, by local index
};

/// The block's words behind those of one level: what all ranks' metadata comes to, for all ranks. The table of
/// all counts, which one level keeps here, would be too large.
struct TwoLevelDispatchShared {
  int near_ranks;
  int num_ranks;

  /// Rows from this rank to each: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t sends() const {
    return layout::align_up(MetadataShared{near_ranks}.bytes(), 16);
  }
  /// The first of them there: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t first_rows() const { return sends() + per_rank(); }
  /// Rows that each receives: int32 [R].
  [[nodiscard]] DEEPEP_HD int64_t rows() const { return first_rows() + per_rank(); }
  /// Rows that its arrays have room for: uint32 [R].
  [[nodiscard]] DEEPEP_HD int64_t capacities() const { return rows() + per_rank(); }
  /// T of each rank of another domain: uint32 [R].
  [[nodiscard]] DEEPEP_HD int64_t tokens() const { return capacities() + per_rank(); }
  [[nodiscard]] DEEPEP_HD int64_t items() const { return layout::align_up(tokens() + per_rank(), 16); }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return ItemShared{items()}.end(); }

 private:
  [[nodiscard]] DEEPEP_HD int64_t per_rank() const { return 4 * static_cast<int64_t>(num_ranks); }
};

[[nodiscard]] DEEPEP_HD TwoLevelDispatchShared shared_of(const TwoLevelDispatchArgs& args) {
  return {args.dispatch.group.num_ranks, args.two_level.all.num_ranks};
}
[[nodiscard]] inline int64_t shared_bytes(const TwoLevelDispatchArgs& args) { return shared_of(args).bytes(); }

/// Before a launch, by the host: what follows from the rest. The digest has all live ranks.
inline void prepare(TwoLevelDispatchArgs& args, int num_blocks, int num_warps) {
  prepare(args.dispatch, num_blocks, num_warps);
  Digest live;
  for (const uint32_t word : args.two_level.all.live.words) live.add(word);
  DispatchArgs alike = args.dispatch;
  alike.group.live = live.value;
  args.dispatch.common_words[layout::MailboxWords{0}.digest()] = digest_of(alike);
}

/// A block barrier has to follow.
[[nodiscard]] DEEPEP_DEVICE TwoLevelDispatchCall start(const TwoLevelDispatchArgs& args) {
  using namespace dev;
  const TwoLevelDispatchShared shared = shared_of(args);
  SharedArray<int32_t> first_rows(shared.first_rows());
  SharedArray<int32_t> rows(shared.rows());
  for (int r = thread(); r < shared.num_ranks; r += num_threads()) {
    first_rows.set(r, 0);
    rows.set(r, 0);
  }
  return {args, args.two_level, args.two_level.all, start(args.dispatch)};
}

/// T of a rank of another domain.
[[nodiscard]] DEEPEP_DEVICE int64_t tokens_of(const TwoLevelDispatchCall& call, int source) {
  return dev::SharedArray<uint32_t>(shared_of(call.args).tokens()).get(source);
}

/// Where the tokens of a chunk go, of ranks that follow each other; lane j holds what concerns the j-th.
struct ChunkRoutes {
  ChunkTokens tokens;
  uint32_t going;     // bit i: the chunk's i-th token goes there
  int32_t first_row;  // the final row of the first that goes; the rows of the others follow

  /// The final row of token i, or -1.
  [[nodiscard]] DEEPEP_DEVICE int32_t row(int i) const {
    return ((going >> i) & 1u) ? first_row + going_before(going, i) : -1;
  }
};

/// Of the ranks [first, first + size), at most a warp's lanes. Rows of one source at a rank follow each other,
/// so the first one's is enough; a handle says the same. More tokens for a rank than were posted are left out:
/// they would run into another source's rows, or out of the receive arrays. One warp.
template <bool kCached>
[[nodiscard]] DEEPEP_DEVICE ChunkRoutes routes_of(const TwoLevelDispatchCall& call, const ChunkTokens& tokens,
                                                  int first, int size) {
  using namespace dev;
  const DispatchArgs& args = call.args.dispatch;
  const int ranks = call.all.num_ranks;
  const int rank = first + lane();
  ChunkRoutes routes{tokens, 0, -1};
  if (lane() >= size || !is_live(call.all, rank) || tokens.begin >= tokens.end) return routes;
  const TwoLevelDispatchShared shared = shared_of(call.args);
  const int32_t first_row = SharedArray<int32_t>(shared.first_rows()).get(rank);
  const int32_t end = first_row + SharedArray<int32_t>(shared.sends()).get(rank);
  if (!kCached)
    routes.first_row =
        first_row + load_once(call.args.before + tokens.begin / layout::kChunkRecords * ranks + rank);
#pragma unroll 1
  for (int i = 0; i < tokens.size(); ++i) {
    const int64_t at = (tokens.begin + i) * ranks + rank;
    const int32_t kept = kCached ? load_once(args.send_row + at) : -1;
    const bool goes = kCached ? kept >= 0 : load_once(args.is_token_in_rank + at) != 0;
    if (!goes) continue;
    if (kCached && routes.going == 0) routes.first_row = kept;
    routes.going |= 1u << i;
  }
  const uint32_t lawful = first_bits(routes.going, layout::max_of(end - routes.first_row, 0));
  if (lawful != routes.going) {
    note_rank(call.near.g, Phase::kDisagreement, call.all.rank, static_cast<uint32_t>(end),
              static_cast<uint32_t>(routes.first_row));
    SharedArray<uint32_t>(MetadataShared{call.near.g.num_ranks}.failed())
        .bit_or(0, static_cast<uint32_t>(Phase::kDisagreement));
    routes.going = lawful;
  }
  return routes;
}

}  // namespace deepep::kernels
