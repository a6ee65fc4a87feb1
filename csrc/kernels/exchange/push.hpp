// The bare exchange, phase push_rows: this block's part of the rows to each other rank.
#pragma once

#include "kernels/exchange/call.hpp"

namespace deepep::kernels {

DEEPEP_DEVICE void push_rows(const ExchangeCall& call) {
  using namespace dev;
  const ExchangeArgs& args = call.args;
  const BlockPieces pieces = pieces_of_block(args, args.sent);
  for (int first = warp(); first < pieces.total; first += kPiecesAtOnce * num_warps()) {
    Vec16 v[kPiecesAtOnce];
    Vec16* to[kPiecesAtOnce];
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) {
      const PairVector at = pieces.find(first + u * num_warps());
      to[u] = nullptr;
      if (at.other < 0) continue;
      const std::byte* from = args.source + at.other * args.slots.pair_bytes() + at.offset;
      std::byte* rows = args.heap[at.other] + args.slots.rows(call.epoch, args.rank);
      v[u] = load_once(reinterpret_cast<const Vec16*>(from));
      to[u] = reinterpret_cast<Vec16*>(rows + at.offset);
    }
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u)
      if (to[u] != nullptr) store_streaming(to[u], v[u]);
  }
}

}  // namespace deepep::kernels
