// A rank's memory that its NIC reads and writes: the windows of crossing_layout.hpp, and what is posted beside
// them. A *rail* joins two ranks of different domains of which one is the other's gateway; every rank numbers
// its rails from 0 by the other's rank. Laid out alike on all ranks, so that a put's target follows from the
// peer's number of the rail.
#pragma once

#include "layout/crossing_layout.hpp"

namespace deepep::layout {

/// Offsets in the order in which they are said to lie: words that peers add to, what peers put, what is put
/// from. Two of everything, by turns.
struct RailLayout {
  CrossingBuffer<int64_t> windows;

  [[nodiscard]] DEEPEP_HD constexpr int64_t num_rails() const { return windows.num_peers(); }
  /// The metadata of a dispatch, on its way to `peer`; it arrives in windows.mailbox.
  [[nodiscard]] DEEPEP_HD constexpr int64_t mailbox_out(int64_t rail, int64_t parity) const {
    return windows.total_bytes() + windows.mailbox(rail, parity);
  }
  /// What a rank posts of a combine: uint32 digest, uint32 tokens. Here, and on its way.
  [[nodiscard]] DEEPEP_HD constexpr int64_t digest(int64_t rail, int64_t parity) const {
    return mailbox_out(num_rails(), 0) + (2 * rail + parity) * kCrossingAlignment;
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t digest_out(int64_t rail, int64_t parity) const {
    return digest(num_rails() + rail, parity);
  }
  /// The word that is raised behind it.
  [[nodiscard]] DEEPEP_HD constexpr int64_t digest_signal(int64_t rail, int64_t parity) const {
    return digest(2 * num_rails() + rail, parity);
  }
  /// Calls for the sums of a window: uint32 [window], bit j of a token's: the domain's rank with the local
  /// index j has a row of it. Here, and on its way; and the word behind it: a count that never goes back.
  [[nodiscard]] DEEPEP_HD constexpr int64_t ask(int64_t rail, int64_t half) const {
    return digest(3 * num_rails(), 0) + (2 * rail + half) * ask_bytes();
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t ask_out(int64_t rail, int64_t half) const {
    return ask(num_rails() + rail, half);
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t ask_signal(int64_t rail, int64_t half) const {
    return ask(2 * num_rails(), 0) + (2 * rail + half) * kCrossingAlignment;
  }
  [[nodiscard]] DEEPEP_HD constexpr int64_t bytes() const { return ask_signal(num_rails(), 0); }
  /// Puts of one rank to another that may be open at a time: two windows, what is posted of two calls, and what
  /// is asked and granted for two windows.
  [[nodiscard]] DEEPEP_HD constexpr int64_t max_open_puts() const { return 2 * windows.num_chunks() + 8; }

 private:
  [[nodiscard]] DEEPEP_HD constexpr int64_t ask_bytes() const {
    return align_up(4 * windows.window, kCrossingAlignment);
  }
};

}  // namespace deepep::layout
