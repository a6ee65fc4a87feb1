// Puts of low-latency calls between domains: what a block knows of its call's turn, who puts, and how what
// comes is waited for.
#pragma once

#include "kernels/low_latency/common.hpp"
#include "kernels/low_latency_far/args.hpp"
#include "layout/crossing_layout.hpp"

namespace deepep::kernels {

using layout::FarPut;

/// A call among those of its kind: which half of the memory it has, and what its signals count to.
using FarTurn = layout::WindowTurn;

[[nodiscard]] DEEPEP_DEVICE FarTurn turn_of(uint64_t number) { return {static_cast<int64_t>(number)}; }

/// What has arrived from a far rank, and what leaves for it.
template <class T>
[[nodiscard]] DEEPEP_DEVICE T* arrived_at(const FarRanks& far, const FarTurn& turn, int source,
                                          int64_t offset) {
  return reinterpret_cast<T*>(far.remote + far.slots.arriving(far.number[source], turn.half()) + offset);
}
template <class T>
[[nodiscard]] DEEPEP_DEVICE T* leaving_for(const FarRanks& far, const FarTurn& turn, int rank, int64_t offset) {
  return reinterpret_cast<T*>(far.remote + far.slots.leaving(far.number[rank], turn.half()) + offset);
}

/// The word that a far rank's put of this call raises.
[[nodiscard]] DEEPEP_DEVICE const uint64_t* signal_of(const FarRanks& far, const FarTurn& turn, FarPut kind,
                                                      int source) {
  return reinterpret_cast<const uint64_t*>(far.remote +
                                           far.slots.signal(kind, far.number[source], turn.half()));
}

/// Waits for a far rank's put of this call; notes a fault of `phase` if it does not come.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_put(const Call& call, FarPut kind, int source, Phase phase) {
  using namespace dev;
  const auto wanted = static_cast<uint32_t>(call.turn.arrivals());
  const uint64_t* word = signal_of(call.far, call.turn, kind, source);
  if (wait_signal<acquire, sys_scope>(word, wanted, call.deadline)) return true;
  note_fault(call.g, phase, 1u << source, wanted, static_cast<uint32_t>(load<relaxed, sys_scope>(word)));
  return false;
}

/// Whether it has come. It orders nothing.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool has_put(const Call& call, FarPut kind, int source) {
  using namespace dev;
  const uint64_t count = load<relaxed, sys_scope>(signal_of(call.far, call.turn, kind, source));
  return static_cast<int32_t>(static_cast<uint32_t>(count) - static_cast<uint32_t>(call.turn.arrivals())) >= 0;
}

/// Puts `bytes` that leave for a far rank, from `offset` of its stretch on. One thread, which knows of all that
/// was stored there: the fence puts that before the put reads it.
template <class Call>
DEEPEP_DEVICE void put_stretch(const Call& call, FarPut kind, int rank, int64_t offset, int64_t bytes) {
  using namespace dev;
  const FarRanks& far = call.far;
  const int there = far.there[rank];
  const int64_t half = call.turn.half();
  fence<acq_rel, sys_scope>();
  put_signal<signal_add>(far.wire, far.remote + far.slots.arriving(there, half) + offset,
                         far.remote + far.slots.leaving(far.number[rank], half) + offset, bytes,
                         reinterpret_cast<uint64_t*>(far.remote + far.slots.signal(kind, there, half)), 1,
                         rank);
}

/// Tokens before `token` that are among a row of them, as bits from word `first` on.
[[nodiscard]] DEEPEP_DEVICE int tokens_before(dev::SharedArray<uint32_t> bits, int first, int token) {
  int before = 0;
  DEEPEP_ROLLED
  for (int word = 0; word < token / 32; ++word) before += dev::popcount(bits.get(first + word));
  return before + dev::popcount(bits.get(first + token / 32) & ((1u << (token % 32)) - 1u));
}

/// Whether a block ends its launch's sending, and whether all blocks have made all that they send.
enum class Sent : uint32_t { kSome, kAll, kAllButLost };

/// By a thread of each block, behind a block barrier that follows all that it stores to be put. `has_lost`: not
/// all of it was made. The last block knows what all have stored, and puts it.
[[nodiscard]] DEEPEP_DEVICE Sent count_sent(FarState* state, bool has_lost) {
  using namespace dev;
  constexpr uint32_t kLost = 1u << 16;
  const uint32_t mine = has_lost ? kLost + 1 : 1;
  const uint32_t sent = fetch_add<acq_rel, gpu_scope>(&state->blocks_sent, mine) + mine;
  if ((sent & (kLost - 1)) != static_cast<uint32_t>(num_blocks())) return Sent::kSome;
  store(&state->blocks_sent, 0u);
  return sent >= kLost ? Sent::kAllButLost : Sent::kAll;
}

/// Ranks that something is put to, a lane of the first warp each.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool puts_to(const Call& call, int rank) {
  return (((call.far.bits & call.live) >> rank) & 1u) != 0;
}

}  // namespace deepep::kernels
