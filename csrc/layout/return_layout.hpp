// The way back inside a domain: rows that the ranks of a domain return to a token's gateway over NVLink, which
// sums them. A token's own rank is its gateway in its own domain. Windows and chunks are those of
// crossing_layout.hpp: those of one source are numbered over all calls, and use two halves by turns.
#pragma once

#include "layout/crossing_layout.hpp"
#include "layout/symmetric_layout.hpp"

namespace deepep::layout {

/// One rank's part of the heap that its domain maps, behind the control words. Offsets are from its start.
struct ReturnStaging {
  int64_t num_slots;     // sources that a rank is the gateway of at most, itself included
  int64_t window;        // tokens
  int64_t domain_ranks;  // P
  int64_t num_ranks;
  int64_t record_bytes;  // of ReturnRecord

  /// Windows of this slot's source whose chunk the neighbour with this local index has returned, in this half:
  /// a 4-byte count that never goes back. Its one writer is the neighbour.
  [[nodiscard]] DEEPEP_HD constexpr int64_t returned(int64_t slot, int64_t half, int64_t chunk,
                                                     int64_t local) const {
    return 4 * (((2 * slot + half) * (window / kChunkRecords) + chunk) * domain_ranks + local);
  }
  /// At a rank that returns rows: windows of `source` that its gateway in this domain has summed, in this half:
  /// the same. Its one writer is that gateway.
  [[nodiscard]] DEEPEP_HD constexpr int64_t summed(int64_t source, int64_t half) const {
    return align_up(returned(num_slots, 0, 0, 0), kLine) + kLine * source + 4 * half;
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t words() const { return summed(num_ranks, 0); }
  /// The row that `local` returns for the token so far from the window's first.
  [[nodiscard]] DEEPEP_HD constexpr int64_t row(int64_t slot, int64_t half, int64_t token,
                                                int64_t local) const {
    return words() + (((2 * slot + half) * window + token) * domain_ranks + local) * record_bytes;
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t bytes() const { return align_up(row(num_slots, 0, 0, 0), kLine); }
};

}  // namespace deepep::layout
