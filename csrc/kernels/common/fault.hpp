// Faults: a wait that ended in vain is noted in device memory; one block of the launch reports the notes to the
// host.
#pragma once

#include "kernels/common/group.hpp"

namespace deepep::kernels {

/// Notes a wait that ended without what it waited for, before the block reports its faults. The first note's
/// numbers stay; ranks add up.
DEEPEP_DEVICE void note_fault(const Group& g, Phase phase, uint32_t missing, uint32_t expected, uint32_t seen) {
  using namespace dev;
  if (fetch_or<relaxed, gpu_scope>(&g.state->phase, static_cast<uint32_t>(phase)) == 0) {
    store<relaxed, gpu_scope>(&g.state->expected, expected);
    store<relaxed, gpu_scope>(&g.state->seen, seen);
  }
  fetch_or<relaxed, gpu_scope>(&g.state->missing, missing);
}

/// The time for which a block that failed waits for the others' faults before it reports: their deadlines are
/// the same.
inline constexpr uint64_t kGatherNs = 1000000;

/// The end of a block in which a wait was in vain: the first such block reports what has been noted to the
/// host. One thread, behind a block barrier. The host clears the notes before it launches again. `more(record)`
/// adds to it.
template <class More>
DEEPEP_DEVICE void report_fault(const Group& g, Operation operation, const More& more) {
  using namespace dev;
  LocalState* state = g.state;
  // Nothing noted: the block stopped for a reason that the host learns with the counts.
  if (load<relaxed, gpu_scope>(&state->phase) == 0) return;
  if (fetch_add<acq_rel, gpu_scope>(&state->fault_reported, 1u) != 0) return;
  const Deadline gathered = Deadline::in(kGatherNs);
  while (!gathered.passed()) pause();
  FaultRecord* record = g.fault;
  store(&record->operation, static_cast<uint32_t>(operation));
  store(&record->phase, load<relaxed, gpu_scope>(&state->phase));
  store(&record->missing, load<relaxed, gpu_scope>(&state->missing));
  store(&record->expected, load<relaxed, gpu_scope>(&state->expected));
  store(&record->seen, load<relaxed, gpu_scope>(&state->seen));
  more(record);
  store<release, sys_scope>(&record->pending, 1u);
}
DEEPEP_DEVICE void report_fault(const Group& g, Operation operation) {
  report_fault(g, operation, [](FaultRecord*) {});
}

}  // namespace deepep::kernels
