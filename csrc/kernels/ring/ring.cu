#include "kernels/ring/ring.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/ring/launch.hpp"

namespace deepep::kernels {

namespace {

Kernel<RingArgs> kernel_of(RingStep step) {
  switch (step) {
    case RingStep::kBeforeSend: return ring_before_send_kernel;
    case RingStep::kBehindSend: return ring_behind_send_kernel;
    case RingStep::kBeforeReceive: return ring_before_receive_kernel;
    default: return ring_behind_receive_kernel;
  }
}

}  // namespace

void load_ring() {
  for (const RingStep step :
       {RingStep::kBeforeSend, RingStep::kBehindSend, RingStep::kBeforeReceive, RingStep::kBehindReceive})
    load<RingArgs>(kernel_of(step), "ring");
}

void launch_ring(const RingArgs& args, RingStep step, void* stream) {
  launch<RingArgs>(kernel_of(step), args, 1, kRingThreads, 0, stream, "ring");
}

}  // namespace deepep::kernels
