// The whole group, which may have more ranks than a mask has bits: who takes part, and faults by rank.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/two_level/args.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE bool is_live(const AllRanks& all, int rank) { return all.live.has(rank); }

/// note_fault of one rank, by its number in the group; `near`: this rank's domain, whose state is the rank's.
DEEPEP_DEVICE void note_rank(const Group& near, Phase phase, int rank, uint32_t expected, uint32_t seen) {
  using namespace dev;
  note_fault(near, phase, 0, expected, seen);
  fetch_or<relaxed, gpu_scope>(&near.state->missing_of_group[rank / 32], 1u << (rank % 32));
}

/// Notes that a rank's word has not come to what was `wanted`, with what it says.
template <class Word>
DEEPEP_DEVICE void note_late(const Group& near, Phase phase, int rank, uint32_t wanted, const Word* word) {
  using namespace dev;
  note_rank(near, phase, rank, wanted, static_cast<uint32_t>(load<relaxed, sys_scope>(word)));
}

/// As in one level, with the group's ranks.
DEEPEP_DEVICE void report_fault(const AllRanks& all, const Group& near, Operation operation) {
  using namespace dev;
  report_fault(near, operation, [&](FaultRecord* record) {
    for (int word = 0; 32 * word < all.num_ranks; ++word)
      store(&record->missing_of_group[word], load<relaxed, gpu_scope>(&near.state->missing_of_group[word]));
  });
}

}  // namespace deepep::kernels
