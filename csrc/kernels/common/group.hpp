// The group on the device: where a peer's memory is, the epoch of a call, credit for the combine staging.
#pragma once

#include "device/device.hpp"
#include "kernels/common/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE bool is_live(const Group& g, int rank) { return (g.live >> rank) & 1u; }

template <class T>
[[nodiscard]] DEEPEP_DEVICE T* at(const Group& g, int rank, int64_t offset) {
  return reinterpret_cast<T*>(g.heap[rank] + offset);
}

/// A digest of what all ranks must pass alike, in one word (FNV-1a over 32-bit values).
struct Digest {
  uint32_t value = 2166136261u;
  DEEPEP_HD void add(uint32_t part) { value = (value ^ part) * 16777619u; }
};
/// In place of a digest, the word of a rank that refuses the call; no digest has it.
inline constexpr uint32_t kRefusal = 0;

/// The number of this call, read by every block at its start. All threads. Never 0, which is what words hold
/// that nobody has written yet; nor 1 after 2^32 - 1, for what lies in two places in turn goes by the lowest
/// bit.
[[nodiscard]] DEEPEP_DEVICE uint32_t next_epoch(uint32_t last) { return last == 0xffffffffu ? 2 : last + 1; }
[[nodiscard]] DEEPEP_DEVICE uint32_t next_epoch(const uint32_t* epoch) { return next_epoch(dev::load(epoch)); }

/// Advances the epoch when all blocks have read it: on the device, so that a replayed graph counts on; and
/// without a wait, so that no block needs another one to be resident. One thread of every block, behind a block
/// barrier that follows the block's own reads. Whether this block was the last.
DEEPEP_DEVICE bool advance_epoch(uint32_t* blocks_started, uint32_t* epoch, uint32_t value) {
  using namespace dev;
  const uint32_t before = fetch_add<acq_rel, gpu_scope>(blocks_started, 1u);
  if (before + 1 != static_cast<uint32_t>(num_blocks())) return false;
  store(blocks_started, 0u);
  store(epoch, value);
  return true;
}
DEEPEP_DEVICE bool advance_epoch(const Group& g, uint32_t* epoch, uint32_t value) {
  return advance_epoch(&g.state->blocks_started, epoch, value);
}

/// Grants the peers credit for this rank's staging: all its combines up to `epoch` have read it. Granted at the
/// start of a kernel, not at the end of the one that read: that one's end has waited for the reads, so that no
/// write can reach them any more and the word needs no order. Some of one block's threads.
DEEPEP_DEVICE void grant_credit(const Group& g, uint32_t epoch) {
  using namespace dev;
  DEEPEP_ROLLED
  for (int peer = thread(); peer < g.num_ranks; peer += num_threads())
    if (peer != g.rank && is_live(g, peer))
      store<relaxed, sys_scope>(at<uint32_t>(g, peer, g.control.staging_free(g.rank)), epoch);
}

}  // namespace deepep::kernels
