// Going on without ranks that are missing, where masks are allowed (Group::shrinks).
//
// A wait in vain is noted, as a fault is, and its block leaves out what it has no rows for. The last block of
// the launch to get here looks at the notes of all. Where a rank is missing it receives once more what each
// block of the launch has received, without that rank: all results are as if it had been masked before. What it
// misses then is left out, too, and it begins again. Then the ranks are masked, for this launch's successors.
#pragma once

#include "kernels/low_latency/common.hpp"

namespace deepep::kernels {

/// What blocks have noted.
struct Notes {
  uint32_t phases;
  uint32_t missing;
};

/// Of a launch whose blocks have all come here: the counter orders what they noted before this.
[[nodiscard]] DEEPEP_DEVICE Notes read_notes(const Group& g) {
  return {dev::load(&g.state->phase), dev::load(&g.state->missing)};
}

/// True if masks mend that: nothing but waits in vain, and for other ranks.
[[nodiscard]] DEEPEP_DEVICE bool can_mend(const Group& g, const Notes& notes) {
  const uint32_t disagreement = static_cast<uint32_t>(Phase::kDisagreement);
  return notes.missing != 0 && ((notes.missing >> g.rank) & 1u) == 0 && (notes.phases & disagreement) == 0;
}

/// True on the last block of the launch: it sees what all have done. One thread, behind a block barrier.
[[nodiscard]] DEEPEP_DEVICE bool is_last_block(const Group& g) {
  using namespace dev;
  if (fetch_add<acq_rel, gpu_scope>(&g.state->blocks_finished, 1u) + 1 != static_cast<uint32_t>(num_blocks()))
    return false;
  store(&g.state->blocks_finished, 0u);
  return true;
}

/// Masks ranks, and takes the notes of them back. One thread of the last block.
DEEPEP_DEVICE void mask(const Group& g, uint32_t missing) {
  using namespace dev;
  LocalState* state = g.state;
  const uint32_t masked = load(&state->masked) | missing;
  store(&state->masked, masked);
  for (uint32_t* note : {&state->phase, &state->missing, &state->expected, &state->seen})
    store(note, 0u);
  store<relaxed, sys_scope>(&g.fault->masked, masked);
}

/// What a block does next.
enum class Next : uint32_t { kEnd, kReport, kFirst, kOther };

template <class Call>
[[nodiscard]] DEEPEP_DEVICE dev::SharedArray<uint32_t> mending_of(const Call& call) {
  return dev::SharedArray<uint32_t>(call.shared().mending());
}

/// One thread. A block barrier has to follow.
template <class Call>
DEEPEP_DEVICE void begin_mending(const Call& call) {
  for (int word = 0; word < Mending::kWords; ++word) mending_of(call).set(word, 0);
}

/// The round of receiving that the block is in.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE int round_of(const Call& call) {
  return call.masks ? static_cast<int>(mending_of(call).get(Mending::kRound)) : 0;
}

/// Where masks are allowed: true on the last block, if there is a fault that they do not mend.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool must_report(const Call& call) {
  return mending_of(call).get(Mending::kNext) == static_cast<uint32_t>(Next::kReport);
}

/// One thread: what comes behind a round.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE Next next_of(const Call& call, dev::SharedArray<uint32_t> mending) {
  using namespace dev;
  const Group& g = call.g;
  if (mending.get(Mending::kRound) == 0 && !is_last_block(g)) return Next::kEnd;
  const Notes notes = read_notes(g);
  if (notes.phases == 0) return Next::kEnd;
  if (!can_mend(g, notes)) return Next::kReport;
  if (mending.get(Mending::kMissing) != notes.missing) {
    mending.set(Mending::kMissing, notes.missing);
    return Next::kFirst;
  }
  if (call.block != num_blocks() - 1) return Next::kOther;
  mask(g, notes.missing);
  return Next::kEnd;
}

/// Behind what a block has received. True on the last block, as often as it has to receive again: as
/// call.block, from call.live. All threads, with barriers.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool mends(Call& call) {
  using namespace dev;
  if (!call.masks) return false;
  SharedArray<uint32_t> mending = mending_of(call);
  sync_block();
  if (thread() == 0) {
    const Next next = next_of(call, mending);
    mending.set(Mending::kNext, static_cast<uint32_t>(next));
    mending.set(Mending::kRound, mending.get(Mending::kRound) + 1);
    forget_failures(call);
  }
  sync_block();
  const Next next = static_cast<Next>(mending.get(Mending::kNext));
  if (next == Next::kEnd || next == Next::kReport) return false;
  call.live &= ~mending.get(Mending::kMissing);
  if (next == Next::kFirst) call.deadline = Deadline::in(call.g.timeout_ns);
  take_part(call, next == Next::kFirst ? 0 : call.block + 1);
  return true;
}

/// Behind a launch that only sends, and a block barrier behind its waits: masks what it was waiting for in
/// vain.
template <class Call>
DEEPEP_DEVICE void mask_missing(const Call& call) {
  using namespace dev;
  if (!call.masks) return;
  if (thread() != 0 || !is_last_block(call.g)) return;
  const Notes notes = read_notes(call.g);
  if (can_mend(call.g, notes))
    mask(call.g, notes.missing);
  else if (notes.phases != 0)
    mending_of(call).set(Mending::kNext, static_cast<uint32_t>(Next::kReport));
}

}  // namespace deepep::kernels
