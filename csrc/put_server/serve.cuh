// How warps serve a queue of puts: each of them some of the orders, so that they overtake each other.
#pragma once

#include "device/device.hpp"

namespace deepep::put_server {

inline constexpr int kThreads = 256;  // that serve a queue
/// Beyond an operation's own deadlines, which all end before.
inline constexpr uint64_t kGraceNs = 10'000'000'000;

/// Waits for order `number`; false if the operation ends without it, or at the deadline. One warp.
[[nodiscard]] __device__ inline bool wait_order(const dev::PutQueue& queue, uint32_t number, uint32_t operation,
                                                dev::Deadline deadline) {
  using namespace dev;
  bool stands = false;
  if (lane() == 0) {
    const uint32_t* ready = &queue.orders[number & queue.last].ready;
    const auto is_ready = [&](uint32_t seen) {
      stands = seen == number + 1;
      // Closed behind all orders: one that there is stands by then.
      if (stands || load<acquire, gpu_scope>(&queue.state->closed) == operation) return stands;
      stands = static_cast<int32_t>(load<relaxed, gpu_scope>(&queue.state->ordered) - number) > 0;
      return true;
    };
    if (!wait_until<acquire, gpu_scope>(ready, is_ready, deadline)) stands = false;
  }
  sync_warp();  // lane 0's acquire comes before what the warp reads
  return ballot(stands) != 0;
}

/// Whole block, of which kThreads serve each queue, in order; `queue` is that of the calling thread, or has no
/// state. `deliver(order, number)` is called by whole warps.
template <class Deliver>
__device__ void serve(const dev::PutQueue& queue, uint64_t timeout_ns, const Deliver& deliver) {
  using namespace dev;
  constexpr uint32_t kWarps = kThreads / kWarpSize;
  const bool serves = queue.state != nullptr;
  if (serves) {
    const Deadline deadline = Deadline::in(timeout_ns + kGraceNs);
    const uint32_t first = load(&queue.state->served);
    const uint32_t operation = load(&queue.state->services);
    for (uint32_t number = first + static_cast<uint32_t>(warp()) % kWarps;
         wait_order(queue, number, operation, deadline); number += kWarps)
      deliver(queue.orders[number & queue.last], number);
  }
  sync_block();
  if (!serves || thread() % kThreads != 0) return;
  store(&queue.state->served, load<relaxed, gpu_scope>(&queue.state->ordered));
  // One more, unless the operation did not come: then the next one's server is to wait for that.
  store(&queue.state->services, load<relaxed, gpu_scope>(&queue.state->closed));
}

}  // namespace deepep::put_server
