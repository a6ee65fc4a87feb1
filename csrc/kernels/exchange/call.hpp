// A call of the bare exchange as its phases see it, and what a block has of each pair's rows.
#pragma once

#include "kernels/common/group.hpp"
#include "kernels/exchange/args.hpp"

namespace deepep::kernels {

struct ExchangeCall {
  const ExchangeArgs& args;
  uint32_t epoch;
  dev::Deadline deadline;
};

/// All threads.
[[nodiscard]] DEEPEP_DEVICE ExchangeCall start(const ExchangeArgs& args) {
  using namespace dev;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  SharedArray<uint32_t> failed(0);
  if (thread() == 0) failed.set(0, 0);
  const uint32_t epoch = next_epoch(&args.state->epoch);
  return {args, epoch, deadline};
}

/// One thread of the block, behind a block barrier: not the one that raises flags, since both have a fence.
DEEPEP_DEVICE void advance_epoch(const ExchangeCall& call) {
  using namespace dev;
  ExchangeState* state = call.args.state;
  if (thread() == num_threads() - 1) advance_epoch(&state->blocks_started, &state->epoch, call.epoch);
}

/// One vector of 16 bytes of the rows between this rank and another.
struct PairVector {
  int other;       // the rank; -1: there is no such vector
  int64_t offset;  // of its bytes
};

/// This block's part of the rows to, or from, all other ranks: they are cut into pieces of a vector for each
/// lane, and dealt to blocks in turn. Lane o has the numbers of the o-th rank after this one, so that no two
/// ranks begin with the same.
struct BlockPieces {
  const ExchangeArgs& args;
  int vectors;  // of the pair
  int before;   // pieces of the ranks before, in this order
  int total;

  /// Piece `k` of the block. All lanes of a warp.
  [[nodiscard]] DEEPEP_DEVICE PairVector find(int k) const {
    using namespace dev;
    // Ranks without pieces have the same number before them as the next, so the last rank is the one.
    const int order = popcount(ballot(lane() < args.num_ranks - 1 && before <= k)) - 1;
    const int piece = block() + (k - shuffle(before, order)) * num_blocks();
    const int vector = piece * kWarpSize + lane();
    if (vector >= shuffle(vectors, order) || k >= total) return {-1, 0};
    const int other = args.rank + 1 + order;
    return {other < args.num_ranks ? other : other - args.num_ranks, int64_t{16} * vector};
  }
};

/// count: vectors to or from each rank. All lanes of a warp.
[[nodiscard]] DEEPEP_DEVICE BlockPieces pieces_of_block(const ExchangeArgs& args, const int32_t* count) {
  using namespace dev;
  int vectors = 0;
  if (lane() < args.num_ranks - 1) {
    const int other = args.rank + 1 + lane();
    vectors = count[other < args.num_ranks ? other : other - args.num_ranks];
  }
  const int left = (vectors + kWarpSize - 1) / kWarpSize - block();
  const int own = left > 0 ? (left + num_blocks() - 1) / num_blocks() : 0;
  return {args, vectors, warp_exclusive_sum(own), warp_sum(own)};
}

/// Pieces that a warp has under way.
inline constexpr int kPiecesAtOnce = 4;

}  // namespace deepep::kernels
