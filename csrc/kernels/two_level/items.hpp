// Items of work, which a kernel's blocks claim in order. An item waits only for items that come before it in
// this order, on whichever rank; so the earliest that is not done can always go on, however few blocks run.
#pragma once

#include "kernels/two_level/group.hpp"

namespace deepep::kernels {

/// The block's words, at `begin` of its dynamic shared memory.
struct ItemShared {
  int64_t begin;

  /// The item that the block has claimed: uint32 [2], in turn.
  [[nodiscard]] DEEPEP_HD int64_t claimed() const { return begin; }
  /// Whether some thread has waited in vain, in this turn: likewise.
  [[nodiscard]] DEEPEP_HD int64_t missed() const { return begin + 8; }
  [[nodiscard]] DEEPEP_HD int64_t end() const { return begin + 16; }
};

/// A block's turn: what it waits for before it works on an item.
struct ItemTurn {
  ItemShared shared;
  int parity;

  /// By a thread that has waited in vain.
  DEEPEP_DEVICE void give_up() const { dev::SharedArray<uint32_t>(shared.missed()).bit_or(parity, 1u); }
  /// Whether what the block's threads have waited for has come; the same on all of them. Acquires of any come
  /// before what all of them do behind it.
  [[nodiscard]] DEEPEP_DEVICE bool is_ready() const {
    using namespace dev;
    sync_block();
    return SharedArray<uint32_t>(shared.missed()).get(parity) == 0;
  }
};

/// Calls work(item, turn) for items that the block claims, all threads, until none is left or one fails: work
/// says so, the same on all threads. Whether none did.
template <class Work>
[[nodiscard]] DEEPEP_DEVICE bool work_on_items(const TwoLevelArgs& args, int64_t shared, uint32_t num_items,
                                               const Work& work) {
  using namespace dev;
  const ItemShared words{shared};
  SharedArray<uint32_t> claimed(words.claimed());
  SharedArray<uint32_t> missed(words.missed());
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    if (thread() == 0) {
      claimed.set(parity, fetch_add<relaxed, gpu_scope>(&args.state->claimed, 1u));
      missed.set(parity, 0u);
    }
    sync_block();
    const uint32_t item = claimed.get(parity);
    if (item >= num_items) return true;
    if (!work(item, ItemTurn{words, parity})) return false;
  }
}

/// A part of this rank's memory that its NIC knows.
template <class T>
[[nodiscard]] DEEPEP_DEVICE T* remote_at(const TwoLevelArgs& args, int64_t offset) {
  return reinterpret_cast<T*>(args.remote + offset);
}

/// Tokens [begin, end) of a chunk of a window.
struct ChunkTokens {
  int64_t begin;
  int64_t end;
  [[nodiscard]] DEEPEP_DEVICE int size() const { return static_cast<int>(end - begin); }
};

[[nodiscard]] DEEPEP_DEVICE ChunkTokens tokens_of_chunk(const TwoLevelArgs& args, int64_t num_tokens,
                                                        int64_t window, int chunk) {
  const int64_t begin = window * args.staging.window + chunk * layout::kChunkRecords;
  const int64_t end = layout::min_of(begin + layout::kChunkRecords, num_tokens);
  return {layout::min_of(begin, end), end};
}

[[nodiscard]] DEEPEP_DEVICE int64_t windows_of(const TwoLevelArgs& args, int64_t num_tokens) {
  return layout::Windows{num_tokens, args.staging.window}.count();
}

[[nodiscard]] DEEPEP_DEVICE int num_chunks(const TwoLevelArgs& args) {
  return static_cast<int>(args.layout.windows.num_chunks());
}

/// The bits before the i-th.
[[nodiscard]] DEEPEP_DEVICE int bits_before(uint32_t bits, int i) {
  return dev::popcount(bits & ((1u << i) - 1));
}

/// Zeros behind a record's last field, up to its end: nothing crosses that nobody wrote. One warp.
DEEPEP_DEVICE void pad_record(std::byte* record, int64_t from, int64_t end) {
  auto* words = reinterpret_cast<uint32_t*>(record);
  for (int64_t word = from / 4 + dev::lane(); word < end / 4; word += dev::kWarpSize)
    dev::store(words + word, 0u);
}

/// The number of the n-th bit that is set.
[[nodiscard]] DEEPEP_DEVICE int nth_bit(uint32_t bits, int n) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) bits &= bits - 1;
  return dev::lowest_bit(bits);
}

/// Waits until the peer has read what lies where window `number` is to be written. One thread.
DEEPEP_DEVICE void wait_window_credit(const TwoLevelArgs& args, const Group& g, const ItemTurn& turn, int rail,
                                      uint64_t number, dev::Deadline deadline) {
  using namespace dev;
  const layout::WindowTurn window{static_cast<int64_t>(number)};
  const auto wanted = static_cast<uint32_t>(window.credit());
  const uint64_t* credit = remote_at<uint64_t>(args, args.layout.windows.credit(rail, window.half()));
  if (wait_signal<acquire, sys_scope>(credit, wanted, deadline)) return;
  note_late(g, Phase::kStaging, args.rails.peer[rail], wanted, credit);
  turn.give_up();
}

/// Waits for a chunk of the peer's window `number`. One thread.
DEEPEP_DEVICE void wait_chunk(const TwoLevelArgs& args, const Group& g, const ItemTurn& turn, int rail,
                              uint64_t number, int chunk, Phase phase, dev::Deadline deadline) {
  using namespace dev;
  const layout::WindowTurn window{static_cast<int64_t>(number)};
  const auto wanted = static_cast<uint32_t>(window.arrivals());
  const uint64_t* arrived = remote_at<uint64_t>(args, args.layout.windows.arrived(rail, window.half(), chunk));
  if (wait_signal<acquire, sys_scope>(arrived, wanted, deadline)) return;
  note_late(g, phase, args.rails.peer[rail], wanted, arrived);
  turn.give_up();
}

/// Sends a chunk of window `number` with records of so many bytes, which the block's warps have made. One
/// thread, behind a block barrier: the fence puts what they stored before the put reads it.
DEEPEP_DEVICE void put_chunk(const TwoLevelArgs& args, int rail, uint64_t number, int chunk, int64_t bytes) {
  using namespace dev;
  const auto& windows = args.layout.windows;
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(number)}.half();
  const int there = args.rails.there[rail];
  fence<acq_rel, sys_scope>();
  put_signal<signal_add>(args.wire, remote_at<std::byte>(args, windows.receive_chunk(there, half, chunk)),
                         remote_at<std::byte>(args, windows.send_chunk(rail, half, chunk)),
                         layout::kChunkHeader + bytes,
                         remote_at<uint64_t>(args, windows.arrived(there, half, chunk)), 1,
                         args.rails.peer[rail]);
}

/// Lets the peer write where window `number` lay, which was read. One thread, which knows of all reading.
DEEPEP_DEVICE void grant_window_credit(const TwoLevelArgs& args, int rail, uint64_t number) {
  using namespace dev;
  const int64_t half = layout::WindowTurn{static_cast<int64_t>(number)}.half();
  fence<acq_rel, sys_scope>();
  signal<signal_add>(args.wire,
                     remote_at<uint64_t>(args, args.layout.windows.credit(args.rails.there[rail], half)), 1,
                     args.rails.peer[rail]);
}

/// Counts a chunk that is done with; whether it was the last of its window. One thread, behind a block barrier.
[[nodiscard]] DEEPEP_DEVICE bool count_chunk(const TwoLevelArgs& args, uint32_t* counter) {
  using namespace dev;
  const uint32_t done = fetch_add<acq_rel, gpu_scope>(counter, 1u) + 1;
  if (done != static_cast<uint32_t>(num_chunks(args))) return false;
  store(counter, 0u);
  return true;
}

}  // namespace deepep::kernels
