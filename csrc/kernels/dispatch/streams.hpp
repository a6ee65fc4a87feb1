// Rows on their way to ranks that spread them as they come. A warp of a push block is a stream: its rows at a
// rank follow each other. It says beforehand where they are, and how many; the block's last warp follows
// the others, and says which are there.
#pragma once

#include "kernels/dispatch/number.hpp"
#include "kernels/dispatch/row_fields.hpp"

namespace deepep::kernels {

/// With a warp's progress: it has written all its rows.
inline constexpr uint32_t kFinished = 0x80000000u;

inline constexpr int kStreamUnroll = 8;  // 16-byte accesses of a row that a lane has in flight

/// The row at `source`, read once and stored at the target of each lane whose bit is in `targets`: a store_row
/// with fewer pieces in flight and none held. kArrived: it came while this kernel runs. One warp.
template <bool kArrived>
DEEPEP_DEVICE void copy_row(uint64_t source, uint64_t target, int pieces, uint32_t targets) {
  using namespace dev;
#pragma unroll 1
  for (int begin = lane(); begin < pieces + lane(); begin += kStreamUnroll * kWarpSize) {
    const uint64_t offset = sizeof(Vec16) * static_cast<uint32_t>(begin);
    const Vec16* from = reinterpret_cast<const Vec16*>(source + offset);
    Vec16 v[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      if (begin + u * kWarpSize >= pieces) continue;
      v[u] = kArrived ? load_streaming(from + u * kWarpSize) : load_once(from + u * kWarpSize);
    }
#pragma unroll 1
    for (uint32_t left = targets; left != 0; left &= left - 1) {
      Vec16* to = reinterpret_cast<Vec16*>(shuffle(target, lowest_bit(left)) + offset);
#pragma unroll
      for (int u = 0; u < kStreamUnroll; ++u)
        if (begin + u * kWarpSize < pieces) store_streaming(to + u * kWarpSize, v[u]);
    }
  }
}

/// What push warps have written, uint32 [warps, R]; what the last warp has seen of it, and what it has posted.
/// A block barrier has to follow.
DEEPEP_DEVICE void clear_progress(const DispatchCall& call) {
  using namespace dev;
  const NumberingShared shared = NumberingShared::of(call.args, num_warps());
  const int size = num_warps() * call.g.num_ranks;
  for (int i = thread(); i < size; i += num_threads()) {
    SharedArray<uint32_t>(shared.progress()).set(i, 0u);
    SharedArray<uint32_t>(shared.followed()).set(i, 0u);
    SharedArray<uint32_t>(shared.posted()).set(i, 0u);
  }
  if (thread() == 0) SharedArray<uint32_t>(shared.gave_up()).set(0, 0u);
}

/// Whether rank d spreads what it receives.
[[nodiscard]] DEEPEP_DEVICE bool wants_streams(const DispatchCall& call, int d) {
  return d != call.g.rank && is_live(call.g, d) &&
         recv_array<int32_t>(call.args, d, layout::kSlotPlaces) != nullptr;
}

[[nodiscard]] DEEPEP_DEVICE uint64_t* stream_word(const DispatchCall& call, int d, int warp,
                                                  layout::StreamWord word) {
  const Group& g = call.g;
  const int64_t stream = g.control.stream(g.rank, dev::block() - first_push_block(call.args), warp);
  return at<uint64_t>(g, d, stream) + word;
}

/// Lane d: this warp's rows at rank d, to rank d.
DEEPEP_DEVICE void post_stream(const DispatchCall& call, int32_t begin, int count) {
  using namespace dev;
  if (lane() >= call.g.num_ranks || !wants_streams(call, lane())) return;
  const auto post = [&](layout::StreamWord word, int32_t value) {
    store<relaxed, sys_scope>(stream_word(call, lane(), warp(), word),
                              pack_tagged(static_cast<uint32_t>(value), call.epoch));
  };
  post(layout::kStreamBegin, begin);
  post(layout::kStreamCount, count);
}

/// Lane d: the warp has written its rows before `next` at rank d, with all their fields.
DEEPEP_DEVICE void publish_progress(const DispatchCall& call, uint32_t next) {
  using namespace dev;
  SharedArray<uint32_t> progress(NumberingShared::of(call.args, num_warps()).progress());
  sync_warp();  // the warp's stores come before each lane's release
  if (lane() < call.g.num_ranks) progress.set<release>(warp() * call.g.num_ranks + lane(), next);
}

/// The last warp of a push block: posts what the others have written, until they have written all. One fence
/// for all that is new; of a warp that stores nothing else it delays nobody.
DEEPEP_DEVICE void follow_rows(const DispatchCall& call, const WarpShare& share) {
  using namespace dev;
  const Group& g = call.g;
  if (!share.role.push || warp() != num_warps() - 1) return;
  const NumberingShared shared = NumberingShared::of(call.args, num_warps());
  SharedArray<uint32_t> progress(shared.progress());
  SharedArray<uint32_t> followed(shared.followed());
  SharedArray<uint32_t> posted(shared.posted());
  const int size = (num_warps() - 1) * g.num_ranks;
  for (bool is_finished = false; !is_finished;) {
    bool goes_on = false;
    bool is_new = false;
#pragma unroll 1
    for (int i = lane(); i < size; i += kWarpSize) {
      // Acquire: the warp's stores come before what this one does now; the fence carries them before the word.
      const uint32_t next = progress.get<acquire>(i);
      if ((next & kFinished) == 0) goes_on = true;
      is_new = is_new || (next & ~kFinished) != posted.get(i);
      followed.set(i, next & ~kFinished);
    }
    is_finished = ballot(goes_on) == 0;
    if (ballot(is_new) == 0) {
      pause();
      continue;
    }
    fence<acq_rel, sys_scope>();
#pragma unroll 1
    for (int i = lane(); i < size; i += kWarpSize) {
      const uint32_t next = followed.get(i);
      const int d = i % g.num_ranks;
      if (next == posted.get(i)) continue;
      posted.set(i, next);
      if (wants_streams(call, d))
        store<relaxed, sys_scope>(stream_word(call, d, i / g.num_ranks, layout::kStreamNext),
                                  pack_tagged(next, call.epoch));
    }
  }
}

/// The places of the entries of all the group's rows, to those of `destinations` that spread them.
DEEPEP_DEVICE void write_places(const DispatchCall& call, const TokenGroup& group) {
  using namespace dev;
  const DispatchArgs& args = call.args;
  const uint32_t wanting = ballot(group.going != 0 && wants_streams(call, lane()));
  if (wanting == 0) return;
  const bool came = wait_places(call, group.begin, group.size);
  LaneInRows at = LaneInRows::at_start(args.num_topk, group.size);
#pragma unroll 1
  for (int begin = 0; begin < group.size * args.num_topk; begin += kWarpSize, at.advance()) {
    const int64_t entry = group.begin * args.num_topk + begin + lane();
    int32_t place = kNoPlace;
    if (came && at.row < group.size && expert_of_entry(args, entry) >= 0)
      place = dev::load(args.expanded.places + entry);
#pragma unroll 1
    for (uint32_t left = wanting; left != 0; left &= left - 1) {
      const int d = lowest_bit(left);
      const uint32_t going = shuffle(group.going, d);
      const int32_t first_row = shuffle(group.first_row, d);
      if (at.row >= group.size || !((going >> at.row) & 1u)) continue;
      const int64_t row = first_row + going_before(going, at.row);
      store(recv_array<int32_t>(args, d, layout::kSlotPlaces) + row * args.num_topk + at.column, place);
    }
  }
}

}  // namespace deepep::kernels
