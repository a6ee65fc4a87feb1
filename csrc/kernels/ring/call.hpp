// A call of a ring as its phases see it: where its words are.
#pragma once

#include "kernels/common/fault.hpp"
#include "kernels/ring/args.hpp"

namespace deepep::kernels {

struct RingCall {
  const RingArgs& args;
  int way;        // to the neighbour, as this rank numbers its own
  int peers_way;  // the same, as the neighbour does

  /// A word of this rank's memory, of the neighbour's.
  template <class T>
  [[nodiscard]] DEEPEP_DEVICE T* here(int64_t offset) const {
    return at<T>(args.group, args.group.rank, offset);
  }
  template <class T>
  [[nodiscard]] DEEPEP_DEVICE T* there(int64_t offset) const {
    return at<T>(args.group, args.peer, offset);
  }
};

[[nodiscard]] DEEPEP_DEVICE RingCall start(const RingArgs& args) {
  const Group& g = args.group;
  return {args, layout::RingSlots::way(g.rank, args.peer, g.num_ranks),
          layout::RingSlots::way(args.peer, g.rank, g.num_ranks)};
}

/// Of a wait in vain, or what else went wrong: noted, and reported at once, as nobody else can add to it.
DEEPEP_DEVICE void give_up(const RingCall& call, Operation operation, Phase phase, uint32_t expected,
                           uint32_t seen) {
  note_fault(call.args.group, phase, 1u << call.args.peer, expected, seen);
  report_fault(call.args.group, operation);
}

}  // namespace deepep::kernels
