// Symmetric buffers as layout structs: every offset is one method, so that sender,
// receiver, emulator and host cannot disagree. Bytes, from the start of the buffer.
// Templates over the integer: the device uses int64_t, the host first evaluates
// total_bytes() in 128 bits (fits_int64), after which no offset inside can overflow.
// For the CPU alone: it answers how much memory the public interface asks for.
#pragma once

#include "layout/placement.hpp"

namespace deepep::layout {

/// Regions start on 128 bytes: a full cache line, and more than bulk copies (16) and vector loads need.
inline constexpr int64_t kRegionAlignment = 128;
/// Messages and rows start on 16 bytes: the unit of bulk copies and of the widest load.
inline constexpr int64_t kRowAlignment = 16;
/// Channels that share one scale in the fused FP8 cast and one (amax, amin) pair in LogFMT.
inline constexpr int64_t kScaleGroup = 128;
/// Operations that may be in flight on the fixed-slot path: a peer may still read one while the next arrives.
inline constexpr int64_t kNumEpochs = 2;

/// Fixed-slot (low-latency) buffer of one rank. Dispatch is proportional to R * M: a token crosses to a rank
/// once, however many of its experts live there, into the slot of its source and position; the receiver
/// spreads it. Combine is proportional to M * K: slot (token, k) takes the row of the token's k-th expert.
template <class Int>
struct LowLatencyBuffer {
  Int num_ranks;       // R
  Int num_max_tokens;  // M, per rank
  Int hidden;          // H
  Int num_topk;        // K, or kMaxTopk before it is known

  /// Message header: source token and number of entries, then K
  /// (local expert or -1) int32 and K weights float32.
  [[nodiscard]] DEEPEP_HD constexpr Int header_bytes() const {
    return align_up(Int(2) * 4 + num_topk * (4 + 4), Int(kRowAlignment));
  }
  /// One float32 scale, or one bf16 (amax, amin) pair, for each group of 128 channels.
  [[nodiscard]] DEEPEP_HD constexpr Int group_bytes() const { return ceil_div(hidden, Int(kScaleGroup)) * 4; }
  /// A dispatched token: header, then bf16 channels or FP8 channels with their scales, whichever is longer.
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_message_bytes() const {
    return header_bytes() + align_up(max_of(hidden * 2, hidden + group_bytes()), Int(kRowAlignment));
  }
  /// A row on its way back: bf16, or LogFMT's metadata with chunks that may all have stayed bf16.
  [[nodiscard]] DEEPEP_HD constexpr Int combine_message_bytes() const {
    return align_up(hidden * 2 + group_bytes(), Int(kRowAlignment));
  }

  /// Arrival words of one epoch: one 64-bit word for each source rank, each with a single writer.
  [[nodiscard]] DEEPEP_HD constexpr Int flag_region_bytes() const {
    return align_up(num_ranks * 8, Int(kRegionAlignment));
  }
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_send_region_bytes() const {
    return align_up(num_max_tokens * dispatch_message_bytes(), Int(kRegionAlignment));
  }
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_region_bytes() const {
    return align_up(num_ranks * num_max_tokens * dispatch_message_bytes(), Int(kRegionAlignment));
  }
  [[nodiscard]] DEEPEP_HD constexpr Int combine_region_bytes() const {
    return align_up(num_max_tokens * num_topk * combine_message_bytes(), Int(kRegionAlignment));
  }

  // The order of regions: flags first, so that their addresses depend on R alone and an operation with
  // another M or H finds the words where the last one left them.

  /// Word that `source` sets at this rank when its dispatch of `epoch` has arrived.
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_flag(Int epoch, Int source) const {
    return epoch * flag_region_bytes() + source * 8;
  }
  /// Word that `source` sets when all rows it owes this rank in the combine of `epoch` have arrived.
  [[nodiscard]] DEEPEP_HD constexpr Int combine_flag(Int epoch, Int source) const {
    return (kNumEpochs + epoch) * flag_region_bytes() + source * 8;
  }
  /// Own message of `token`, cast once and then served to every peer from here.
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_send(Int epoch, Int token) const {
    return 2 * kNumEpochs * flag_region_bytes() + epoch * dispatch_send_region_bytes() +
           token * dispatch_message_bytes();
  }
  /// Slot of the message that is number `position` among those `source` sends to this rank.
  [[nodiscard]] DEEPEP_HD constexpr Int dispatch_slot(Int epoch, Int source, Int position) const {
    return dispatch_send(Int(kNumEpochs), 0) + epoch * dispatch_region_bytes() +
           (source * num_max_tokens + position) * dispatch_message_bytes();
  }
  /// Slot, at the token's owner, of the row that comes back from the token's k-th expert. What several entries
  /// share comes back once, for the first of them: the row of a duplicate, the sum of a rank in the
  /// rank-reduced mode.
  [[nodiscard]] DEEPEP_HD constexpr Int combine_slot(Int epoch, Int token, Int k) const {
    return dispatch_slot(Int(kNumEpochs), 0, 0) + epoch * combine_region_bytes() +
           (token * num_topk + k) * combine_message_bytes();
  }
  [[nodiscard]] DEEPEP_HD constexpr Int total_bytes() const { return combine_slot(Int(kNumEpochs), 0, 0); }
};

}  // namespace deepep::layout
