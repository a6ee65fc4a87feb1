// What a dispatch leaves in its handle, and past the rows that came.
#pragma once

#include "kernels/dispatch/metadata.hpp"

namespace deepep::kernels {

/// Block 0: the counts of all ranks into the handle, for combine and cached dispatches.
DEEPEP_DEVICE void save_counts(const DispatchCall& call) {
  if (!is_leader_block()) return;
  const DispatchArgs& args = call.args;
  const int ranks = call.g.num_ranks;
  dev::SharedArray<int32_t> counts(MetadataShared{ranks}.counts());
  for (int i = dev::thread(); i < ranks * ranks; i += dev::num_threads())
    dev::store(args.counts + i, counts.get(i));
}

/// A dispatch that was given up leaves a handle that sends nothing anywhere: a combine queued behind it does no
/// harm. Each block its own part of it; block 0 the counts.
DEEPEP_DEVICE void clear_handle(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const DispatchRole& role = share.role;
  const int ranks = args.group.num_ranks;
  const uint32_t wanted = wanted_ranks(role, args.group) | (role.push ? ~args.group.live : 0u);
  for (int64_t i = thread(); i < (role.end - role.begin) * ranks; i += num_threads())
    if ((wanted >> (i % ranks)) & 1u) store(args.send_row + role.begin * ranks + i, -1);
  if (!is_leader_block()) return;
  for (int i = thread(); i < ranks * ranks; i += num_threads()) store(args.counts + i, 0);
}

/// Local blocks: rows past the received ones, of which count_received() says how many they are, carry no
/// expert, as `num_worst_tokens` promises.
template <class Received>
DEEPEP_DEVICE void pad_indices(const DispatchCall& call, const WarpShare& share,
                               const Received& count_received) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  if (!share.role.local || args.num_worst_tokens <= 0) return;
  const Group& g = call.g;
  const int part = local_block(args);
  const int parts = args.local_blocks;
  const int64_t received = count_received();
  std::byte* idx = recv_array<std::byte>(args, g.rank, layout::kSlotIndices);
  const int64_t end = args.num_worst_tokens * args.num_topk;
  for (int64_t i = received * args.num_topk + part * num_threads() + thread(); i < end;
       i += parts * num_threads()) {
    if (args.index_bytes == 8)
      store(reinterpret_cast<int64_t*>(idx) + i, static_cast<int64_t>(-1));
    else
      store(reinterpret_cast<int32_t*>(idx) + i, -1);
  }
}
DEEPEP_DEVICE void pad_indices(const DispatchCall& call, const WarpShare& share) {
  const Group& g = call.g;
  pad_indices(call, share, [&] {
    dev::SharedArray<int32_t> counts(MetadataShared{g.num_ranks}.counts());
    const auto count = [&](int s, int d) { return counts.get(s * g.num_ranks + d); };
    return layout::first_row_of_source(count, g.num_ranks, g.rank);
  });
}

}  // namespace deepep::kernels
