// Rows of experts back to the owners of their tokens, one for each token: the phases of a combine that send.
#pragma once

#include "kernels/low_latency/combine_digest.hpp"
#include "kernels/low_latency/sum_rows.hpp"
#include "layout/low_latency_rows.hpp"

namespace deepep::kernels {

/// By block 0, where the dispatch carried none: tagged words. An expert's rank finds them by token and entry.
DEEPEP_DEVICE void post_weights(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  if (block() != 0 || args.weights_travelled || args.refused) return;
#pragma unroll 1
  for (int i = thread(); i < args.num_tokens * args.num_topk; i += num_threads()) {
    const int expert = expert_at(args, i);
    const int rank = expert >= 0 ? expert / args.num_local_experts : -1;
    if (rank < 0 || !is_live(g, rank)) continue;
    store<relaxed, sys_scope>(at<uint64_t>(g, rank, args.slots.weights(call.epoch, g.rank)) + i,
                              pack_tagged(load_once(args.topk_weights + i), call.epoch));
  }
}

/// The messages whose rows go back, this rank's own last: others' have a way to go.
[[nodiscard]] DEEPEP_DEVICE MessageList returns_of(const LowLatencyCombineCall& call) {
  const int first = call.g.rank + 1 < call.g.num_ranks ? call.g.rank + 1 : 0;
  return {dev::SharedArray<int32_t>(call.shared().list()), first, call.g.num_ranks};
}

/// Fills the list: none of a rank that is masked, nor of what a dispatch that failed has left in the handle.
/// All threads, with a barrier.
DEEPEP_DEVICE void list_returns(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const bool any = !args.refused && load_once(args.handle.identity) != 0;
  const auto count = [&](int s) {
    return any && is_live(call.g, s) ? load_once(args.handle.num_messages + s) : 0;
  };
  if (thread() == 0) list_messages(returns_of(call), count);
  sync_block();
}

/// The rows of a message and their weights. One warp; nothing if a weight does not come in time.
[[nodiscard]] DEEPEP_DEVICE SumRows rows_of_message(const LowLatencyCombineCall& call, const MessageAt& where) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  const uint32_t* route = args.handle.routes + (int64_t{where.source} * args.max_tokens + where.position) *
                                                   layout::LowLatencyMessage::header_words(args.num_topk);
  uint32_t entry = layout::kNoEntry, weight = 0;
  bool came = true;
  if (lane() < args.num_topk) entry = load_once(route + 1 + lane());
  const bool has_row = entry != layout::kNoEntry;
  if (has_row && args.weights_travelled) weight = load_once(route + 1 + args.num_topk + lane());
  if (has_row && !args.weights_travelled) {
    const int64_t word = int64_t{load_once(route)} * args.num_topk + lane();
    came = wait_word(g, args.slots.weights(call.epoch, where.source) + 8 * word, where.source, Phase::kWeights,
                     call.epoch, call.deadline, weight);
  }
  const int64_t row = has_row ? layout::packed_row(g.num_ranks, args.max_tokens, layout::entry_expert(entry),
                                                   layout::entry_row(entry))
                              : 0;
  const uint32_t rows = ballot(!came) != 0 ? 0 : ballot(has_row);
  return {rows, reinterpret_cast<uint64_t>(args.x + row * args.hidden * 2), float_of_bits(weight)};
}

/// The block's messages: each one's rows to one, which goes to the token's owner.
DEEPEP_DEVICE void reduce_messages(const LowLatencyCombineCall& call) {
  using namespace dev;
  const LowLatencyCombineArgs& args = call.args;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  const MessageList list = returns_of(call);
  const int count = rows_of_block(list.size());
  const WarpRows mine = rows_of_warp(count);
  const int pieces = args.hidden / 8;
  const int64_t row_bytes = int64_t{2} * args.hidden;
#pragma unroll 1
  for (int i = mine.first; i < count; i += mine.step) {
    const MessageAt where = message_at(list, block() + i * num_blocks());
    const SumRows rows = rows_of_message(call, where);
    if (rows.rows == 0) {
      if (lane() == 0) failed.bit_or(0, static_cast<uint32_t>(Phase::kWeights));
      return;  // the deadline has passed
    }
    Vec16* out =
        at<Vec16>(g, where.source, args.slots.returns(call.epoch, g.rank) + where.position * row_bytes);
    sum_rows<true>(out, rows, pieces * mine.part / mine.parts, pieces * (mine.part + 1) / mine.parts);
  }
}

/// The flags of the block's rows, a thread each: the block barrier orders the rows of all warps before them.
/// None if one of them was not made.
DEEPEP_DEVICE void signal_returns(const LowLatencyCombineCall& call) {
  using namespace dev;
  const Group& g = call.g;
  SharedArray<uint32_t> failed(call.shared().failed());
  sync_block();
  const MessageList list = returns_of(call);
  const int count = failed.get(0) == 0 ? rows_of_block(list.size()) : 0;
#pragma unroll 1
  for (int i = thread(); i < count; i += num_threads()) {
    const MessageAt where = message_at(list, block() + i * num_blocks());
    uint32_t* flags = at<uint32_t>(g, where.source, call.args.slots.return_flags(call.epoch, g.rank));
    store<release, sys_scope>(flags + where.position, call.epoch);
  }
}

}  // namespace deepep::kernels
