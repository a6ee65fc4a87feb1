// The bare exchange, phase read_rows: this block's part of the rows that came, as the same block of each other
// rank has pushed them. Their words are summed, so that the reads are not for nothing.
#pragma once

#include "kernels/exchange/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void read_rows(const ExchangeCall& call) {
  using namespace dev;
  const ExchangeArgs& args = call.args;
  if (SharedArray<uint32_t>(0).get(0) != 0) return;
  const BlockPieces pieces = pieces_of_block(args, args.received);
  const std::byte* own = args.heap[args.rank];
  uint32_t sum = 0;
  for (int first = warp(); first < pieces.total; first += kPiecesAtOnce * num_warps()) {
    Vec16 v[kPiecesAtOnce];
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) {
      const PairVector at = pieces.find(first + u * num_warps());
      v[u] = Vec16{};
      if (at.other < 0) continue;
      const std::byte* from = own + args.slots.rows(call.epoch, at.other) + at.offset;
      v[u] = load_streaming(reinterpret_cast<const Vec16*>(from));
    }
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) sum += v[u].w[0] + v[u].w[1] + v[u].w[2] + v[u].w[3];
  }
  const auto of_warp = static_cast<uint32_t>(warp_sum(static_cast<int>(sum)));
  if (lane() == 0) store(args.sums + block() * num_warps() + warp(), of_warp);
}

}  // namespace deepep::kernels
