// Holding SMs and doing nothing with them: what a kernel of communication costs others by its SMs alone.
//
// Phases:
//   hold_sm  until its time is over
#pragma once

#include "device/device.hpp"

namespace deepep::kernels {

struct HoldArgs {
  uint64_t nanoseconds;
};

DEEPEP_DEVICE void hold_sm(const HoldArgs& args) {
  const dev::Deadline end = dev::Deadline::in(args.nanoseconds);
  while (!end.passed()) dev::pause();
}

DEEPEP_KERNEL(hold_kernel, HoldArgs, kThreads) { hold_sm(args); }

}  // namespace deepep::kernels
