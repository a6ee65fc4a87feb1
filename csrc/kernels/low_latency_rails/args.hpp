// The arguments of low-latency calls in two levels: those of calls between domains whose puts go along rails
// alone. A rank's rails lead to the ranks of its own local index, one in each other domain: to them it is a
// gateway, and they are to it.
#pragma once

#include "kernels/low_latency_far/args.hpp"

namespace deepep::kernels {

/// What a rank's own domain is among several of the same size.
struct RailDomain {
  int first;      // its first rank
  int num_ranks;  // P
  layout::Divisor by_ranks;
};

struct RailDispatchArgs : FarDispatchArgs {  // far: the ranks along rails
  RailDomain domain;
};

struct RailCombineArgs : FarCombineArgs {
  RailDomain domain;
};

/// Behind a handle's routes: uint32 [domains, M], the ranks of this domain that a token went to whose gateway
/// this rank is, as bits from the domain's first rank on; by the domain of its source.
template <class Args>
[[nodiscard]] DEEPEP_HD uint32_t* relayed_of(const Args& args) {
  return args.handle.routes + int64_t{args.group.num_ranks} * args.max_tokens *
                                  layout::LowLatencyMessage::header_words(args.num_topk);
}

}  // namespace deepep::kernels
