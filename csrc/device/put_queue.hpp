// The way from a kernel to other domains on a GPU: it orders puts in a queue of its rank's device memory, and a
// kernel beside it serves them (csrc/put_server). So no kernel calls anything that waits without a deadline,
// and none knows which network carries its puts.
#pragma once

#include <cstdint>

namespace deepep::dev {

/// A put of memory of this rank that its NIC knows to the same place of `rank`, where `value` is then added to
/// `word`. No bytes: the signal alone.
struct PutOrder {
  void* to;
  const void* from;
  int64_t bytes;
  uint64_t* word;
  uint64_t value;
  int32_t rank;
  uint32_t ready;  // 1 + the order's number, once it stands
};

/// Counts of all calls, in device memory; none goes back.
struct PutQueueState {
  uint32_t ordered;   // orders, by the operation's threads
  uint32_t closed;    // operations that order nothing any more, by their last block
  uint32_t served;    // orders, by the serving kernel when it ends
  uint32_t services;  // operations, likewise
};

/// One rank's. Nobody waits for a free place: `orders` are a power of two, and at least as many as may be open.
struct PutQueue {
  PutOrder* orders = nullptr;
  PutQueueState* state = nullptr;
  uint32_t last = 0;  // one less than there are
};

}  // namespace deepep::dev
