// Where tensors that go around a ring lie, and the words of their two ranks, in every rank's memory alike.
//
// A rank has two neighbours, and so two ways: 0 with the rank before it, 1 with the one behind; of two ranks
// way 0 alone is used. A way has slots, in which this rank receives; the words of a slot that come with a
// tensor stand in one line, those that come back for what this rank sent there in another.
#pragma once

#include <cstdint>

#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

struct RingSlots {
  static constexpr int kWays = 2;

  int64_t begin;  // in the heap, a multiple of kLine
  int num_slots;  // of a way
  int64_t slot_bytes;

  /// The way between two neighbours, as `rank` numbers its own.
  [[nodiscard]] DEEPEP_HD static int way(int rank, int neighbour, int num_ranks) {
    return neighbour == (rank + num_ranks - 1) % num_ranks ? 0 : 1;
  }
  /// Incoming. The neighbour writes the epoch of the tensor that is in the slot, 4 bytes, and its kind, 8; this
  /// rank notes the epoch of the tensor that it has taken out.
  [[nodiscard]] DEEPEP_HD int64_t filled(int way, int slot) const { return line(2 * place(way, slot)); }
  [[nodiscard]] DEEPEP_HD int64_t kind(int way, int slot) const { return filled(way, slot) + 8; }
  [[nodiscard]] DEEPEP_HD int64_t taken(int way, int slot) const { return filled(way, slot) + 16; }
  /// Outgoing. The neighbour writes the epoch of the tensor that it has taken out; this rank notes that of the
  /// one it has sent.
  [[nodiscard]] DEEPEP_HD int64_t freed(int way, int slot) const { return line(2 * place(way, slot) + 1); }
  [[nodiscard]] DEEPEP_HD int64_t sent(int way, int slot) const { return freed(way, slot) + 4; }
  /// Of a way: 1 once the neighbour gave up waiting for a slot of this rank, which it may then write all the
  /// same; 1 once this rank gave up sending, or receiving.
  [[nodiscard]] DEEPEP_HD int64_t overwritten(int way) const { return line(2 * place(kWays, 0) + way); }
  [[nodiscard]] DEEPEP_HD int64_t sends_broken(int way) const { return overwritten(way) + 4; }
  [[nodiscard]] DEEPEP_HD int64_t receives_broken(int way) const { return overwritten(way) + 8; }
  [[nodiscard]] DEEPEP_HD int64_t word_bytes() const { return line(2 * place(kWays, 0) + kWays) - begin; }
  /// Bytes of a tensor: behind all words.
  [[nodiscard]] DEEPEP_HD int64_t tensor(int way, int slot) const {
    return begin + word_bytes() + place(way, slot) * align_up(slot_bytes, kLine);
  }
  [[nodiscard]] DEEPEP_HD int64_t bytes() const { return tensor(kWays, 0) - begin; }

 private:
  [[nodiscard]] DEEPEP_HD int64_t place(int way, int slot) const { return int64_t{way} * num_slots + slot; }
  [[nodiscard]] DEEPEP_HD int64_t line(int64_t i) const { return begin + i * kLine; }
};

}  // namespace deepep::layout
