// Time lines of warps: the steps that each warp of a launch comes to, and when, where somebody asks for them.
//
// A kernel of which there may be some has one form more, `name_recorded`, whose body has somewhere to write. In
// the others `lines` is nowhere, which the compiler knows: they have the code of a kernel without time lines
// (tests/kernels/test_recorded.py; docs/observing.md).
//
// A warp has a row of 1 + kLineSteps words, zero before the launch. The first: its steps so far, of which only
// the first kLineSteps are kept, and in the upper half the number of its SM. The others: a step in the upper
// byte, and below it the nanosecond at which it began, modulo 2^56.
#pragma once

#include "device/device.hpp"
#include "kernels/common/steps.hpp"

#define DEEPEP_RECORDED_KERNEL(name, Args, threads)                                             \
  DEEPEP_DEVICE void name##_body(const Args& args, const ::deepep::kernels::Lines& lines);      \
  DEEPEP_KERNEL(name, Args, threads) { name##_body(args, {}); }                                 \
  DEEPEP_KERNEL(name##_recorded, ::deepep::kernels::Recorded<Args>, threads) {                  \
    name##_body(args.args, args.lines);                                                         \
  }                                                                                             \
  DEEPEP_DEVICE void name##_body(const Args& args, const ::deepep::kernels::Lines& lines)

namespace deepep::kernels {

/// This warp is at `step` from now on, until its next one. Whole warps; lane 0 writes.
DEEPEP_DEVICE void enter(const Lines& lines, Step step) {
  using namespace dev;
  if (lines.words == nullptr) return;
  sync_warp();  // all lanes are done with the step before,
  if (lane() == 0) {
    constexpr uint64_t kTime = (uint64_t{1} << kLineTimeBits) - 1;
    uint64_t* row = lines.words + (int64_t{block()} * num_warps() + warp()) * kLineWords;
    const auto steps = static_cast<uint32_t>(load(row));
    if (steps < kLineSteps)
      store(row + 1 + steps, static_cast<uint64_t>(step) << kLineTimeBits | (clock_ns() & kTime));
    store(row, static_cast<uint64_t>(sm()) << 32 | (steps + 1u));
  }
  sync_warp();  // and none is at this one before the clock was read
}

}  // namespace deepep::kernels
