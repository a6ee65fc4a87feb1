// The sums of tokens, on the rank that owns them: what a combine does with the rows that come back.
#pragma once

#include "kernels/low_latency/combine_digest.hpp"
#include "kernels/low_latency/sum_rows.hpp"

namespace deepep::kernels {

/// The block's tokens: the rows that come back, ranks ascending. One that does not come in time is a fault.
DEEPEP_DEVICE void sum_tokens(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const int count = rows_of_block(args.num_tokens);
  const WarpRows mine = rows_of_warp(count);
  const int pieces = args.hidden / 8;
  const int64_t row_bytes = int64_t{args.hidden} * 2;
#pragma unroll 1
  for (int i = mine.first; i < count; i += mine.step) {
    const int t = block() + i * num_blocks();
    int position = -1;  // of lane r: of the token's message among those for rank r
    if (lane() < g.num_ranks && is_live(g, lane()))
      position = load_once(args.handle.send_position + t * g.num_ranks + lane());
    bool came = true;
    SumRows rows{ballot(position >= 0), 0, 0.0f};
    if (position >= 0) {
      const uint32_t* flags = at<uint32_t>(g, g.rank, args.slots.return_flags(call.epoch, lane()));
      came = wait_flag(call, flags + position, lane(), Phase::kReturn);
      rows.address = reinterpret_cast<uint64_t>(
          at<std::byte>(g, g.rank, args.slots.returns(call.epoch, lane()) + position * row_bytes));
    }
    if (ballot(!came) != 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kReturn));
      return;  // the deadline has passed
    }
    sync_warp();  // the lanes' acquires come before the whole warp's reads; a ballot orders no memory
    Vec16* out = reinterpret_cast<Vec16*>(args.out + t * row_bytes);
    sum_rows<false>(out, rows, pieces * mine.part / mine.parts, pieces * (mine.part + 1) / mine.parts);
  }
}

}  // namespace deepep::kernels
