// The arguments of low-latency calls between domains: those inside one, and what lies between them.
#pragma once

#include "device/device.hpp"
#include "kernels/low_latency/args.hpp"
#include "layout/low_latency_far_slots.hpp"

namespace deepep::kernels {

/// This rank's words about its puts, in device memory: they survive graph replays, and counts never go back.
struct FarState {
  uint64_t dispatches;
  uint64_t combines;
  uint32_t blocks_sent;  // of the running launch: those that have stored what they send
  uint32_t rests[layout::kMaxRanks];  // and the units that go to each rank as they are, beside rows in LogFMT
};

/// The ranks of other domains, and the way there.
struct FarRanks {
  uint32_t bits;  // which ranks they are
  int number[layout::kMaxRanks];  // of each,
  int there[layout::kMaxRanks];   // and the number that it gives to this rank
  layout::LowLatencyFarSlots slots;
  std::byte* remote;  // this rank's memory that its NIC knows
  dev::Wire wire;     // by which it puts
  FarState* state;
};

struct FarDispatchArgs : LowLatencyDispatchArgs {
  FarRanks far;
};

struct FarCombineArgs : LowLatencyCombineArgs {
  FarRanks far;
};

}  // namespace deepep::kernels
