// How long a low-latency kernel waits for other ranks.
//
// A time-out from its start. Where masks are allowed (Group::shrinks) that is not all: a rank that waits for
// one that is gone comes late to the next operation itself, by as much as it has waited, and others, which had
// all from the one that is gone, must not take it for gone, too. So who has waited for half of its time says so
// to all; and who has waited for all of it for a rank that says so waits for it once more as long. A rank that
// is gone says nothing. And who has waited in vain for one rank looks at least for a while for the others.
#pragma once

#include "kernels/common/waits.hpp"
#include "kernels/low_latency/mend.hpp"

namespace deepep::kernels {

/// Epochs by which the numbers of two operations, one after the other, differ at most: 3 behind 2^32 - 1.
inline constexpr uint32_t kNextNumber = 3;

/// The number of a call among those of both kinds: the same on all ranks.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE uint32_t number_of(const Call& call) {
  return call.epoch + dev::load_once(other_epoch(call));
}

/// Says to the others that this rank is held up in a call, for the `count`th time.
template <class Call>
DEEPEP_DEVICE void post_held(const Call& call, uint32_t count) {
  using namespace dev;
  const Group& g = call.g;
  const uint64_t word = pack_tagged(count, number_of(call));
  DEEPEP_ROLLED
  for (int peer = 0; peer < g.num_ranks; ++peer)
    if (peer != g.rank && is_live(call, peer))
      store<relaxed, sys_scope>(at<uint64_t>(g, peer, call.args.slots.held(g.rank)), word);
}

/// True if `source` has said that it is held up, in this call or the one before, and not only what it had said
/// when it was `seen` last.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool is_held(const Call& call, int source, uint64_t& seen) {
  using namespace dev;
  const uint64_t before = seen;
  seen = load<relaxed, sys_scope>(at<uint64_t>(call.g, call.g.rank, call.args.slots.held(source)));
  const auto held = unpack_tagged(seen);
  return seen != before && held.value != 0 && number_of(call) - held.tag <= kNextNumber;
}

/// Waits for something of `source`: `wait` does until a deadline, and says whether it came.
template <class Call, class Wait>
[[nodiscard]] DEEPEP_DEVICE bool wait_patiently(const Call& call, int source, const Wait& wait) {
  using namespace dev;
  const uint64_t timeout = call.g.timeout_ns;
  const bool extends = call.masks;
  Deadline until = call.deadline;
  if (extends) until.end_ns = layout::max_of(until.end_ns - timeout / 2, Deadline::in(timeout / 8).end_ns);
  uint64_t seen = 0;
#pragma unroll 1
  for (uint32_t count = 1;; ++count) {
    if (wait(until)) return true;
    if (!extends) return false;
    if (count > 1) {  // the whole of its time has passed
      if (count > static_cast<uint32_t>(call.g.num_ranks) || !is_held(call, source, seen)) return false;
      until.end_ns += timeout;
    } else {
      until.end_ns = layout::max_of(until.end_ns, call.deadline.end_ns);
    }
    post_held(call, count);
  }
}

/// The longest that `wait_patiently` may take.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE dev::Deadline last_deadline(const Call& call) {
  const uint64_t extensions = call.masks ? static_cast<uint64_t>(call.g.num_ranks) : 0;
  return {call.deadline.end_ns + extensions * call.g.timeout_ns};
}

/// Waits for a word that carries this call's epoch; notes a fault of `phase` if it does not come. Acquire: by
/// the word its source says, too, that what it read in the operation before has been read, and later kernels
/// write there.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_word(const Call& call, int64_t offset, int source, Phase phase,
                                           uint32_t& value) {
  using namespace dev;
  const Group& g = call.g;
  const uint64_t* word = at<uint64_t>(g, g.rank, offset);
  const auto wait = [&](Deadline until) {
    return wait_tag<acquire, sys_scope>(word, call.epoch, until, value);
  };
  if (wait_patiently(call, source, wait)) return true;
  note_fault(g, phase, 1u << source, call.epoch, unpack_tagged(load<relaxed, sys_scope>(word)).tag);
  return false;
}

/// True if such a word is here already. It says nothing but what it is.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool has_word(const Call& call, int64_t offset, uint32_t& value) {
  using namespace dev;
  const auto word = unpack_tagged(load<relaxed, sys_scope>(at<uint64_t>(call.g, call.g.rank, offset)));
  value = word.value;
  return word.tag == call.epoch;
}

/// Waits for the flag of a row that `source` writes; the same.
template <class Call>
[[nodiscard]] DEEPEP_DEVICE bool wait_flag(const Call& call, const uint32_t* flag, int source, Phase phase) {
  using namespace dev;
  uint32_t seen = 0;
  const auto wait = [&](Deadline until) {
    return wait_masked<acquire, sys_scope>(flag, 0xffffffffu, call.epoch, until, seen);
  };
  if (wait_patiently(call, source, wait)) return true;
  note_fault(call.g, phase, 1u << source, call.epoch, seen);
  return false;
}

/// Where the caller wants to know: adds how long this rank waits for each other one that comes. By block 0,
/// whose first warp has a rank a lane; word_of(source): the offset of a word that it posts in every call.
template <class Call, class WordOf>
DEEPEP_DEVICE void measure_waits(const Call& call, const WordOf& word_of) {
  using namespace dev;
  const Group& g = call.g;
  int64_t* waits = call.args.waits;
  if (!call.watching || waits == nullptr || call.block != 0 || warp() != 0 || round_of(call) != 0) return;
  // Those that are late are waited for as ever, by who needs what they bring: where ranks may be masked, what
  // takes longer than half of the time-out is left out.
  Deadline until = call.deadline;
  if (call.masks) until.end_ns -= g.timeout_ns / 2;
  const bool waiting = has_peer(g) && is_live(call, lane());
  measure_wait(waits, waiting, until, [&] {
    if constexpr (Call::kIsFar)
      if (!is_mapped(call, lane())) return has_posted(call, lane());
    const uint64_t* word = at<uint64_t>(g, g.rank, word_of(lane()));
    return unpack_tagged(load<relaxed, sys_scope>(word)).tag == call.epoch;
  });
}

}  // namespace deepep::kernels
