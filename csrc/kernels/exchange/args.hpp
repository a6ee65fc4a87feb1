// The bare exchange: its arguments and the state that it keeps between calls.
#pragma once

#include "kernels/common/args.hpp"
#include "layout/exchange_slots.hpp"

namespace deepep::kernels {

/// This rank's own words in device memory, zero before the first call: they survive graph replays.
struct ExchangeState {
  uint32_t epoch;
  uint32_t blocks_started;  // blocks of the running kernel that have read its epoch
  uint32_t missing;         // bit r: rank r was waited for in vain, in any call so far
};

struct ExchangeArgs {
  int rank;
  int num_ranks;
  uint64_t timeout_ns;
  layout::ExchangeSlots slots;
  std::byte* heap[layout::kMaxRanks];  // every rank's as mapped here, control_bytes() of it zero
  ExchangeState* state;
  const std::byte* source;              // rows for rank r from r * slots.pair_bytes() on
  int32_t sent[layout::kMaxRanks];      // to each rank, in vectors of 16 bytes
  int32_t received[layout::kMaxRanks];  // from each rank, likewise: what it pushes
  uint32_t* sums;  // [blocks, warps]: sums of the words received; null: nobody reads what came
};

}  // namespace deepep::kernels
