// A low-latency dispatch in two levels as its blocks see it: to ranks of this domain as inside one; to each
// other domain one record of a token, to the gateway, which has messages made of it.
#pragma once

#include "kernels/low_latency_far/dispatch_put.hpp"
#include "kernels/low_latency_rails/rails.hpp"

namespace deepep::kernels {

struct RailDispatchCall : FarDispatchCall {
  static constexpr bool kIsRail = true;

  const RailDomain& domain;
};

/// All threads, with a barrier.
[[nodiscard]] DEEPEP_DEVICE RailDispatchCall start(const RailDispatchArgs& args, const Before& before,
                                                   bool watching) {
  const FarDispatchArgs& far = args;
  return {start(far, before, watching), args.domain};
}

/// Words for a rank of another domain lie among those for its domain, in one put to the gateway.
[[nodiscard]] DEEPEP_DEVICE uint64_t* words_to(const RailDispatchCall& call, int rank, int64_t offset) {
  if (is_neighbour(call.domain, rank)) return words_to(call.near(), rank, offset);
  return words_for(call, next_hop(call, rank)) +
         local_index(call.domain, rank) * call.args.slots.words().count();
}

/// The words of a put.
[[nodiscard]] DEEPEP_DEVICE int words_of_put(const RailDispatchCall& call) {
  return call.domain.num_ranks * call.args.slots.words().count();
}

/// Tokens of word `word`, as bits, that go to any rank of a domain, by what is put there.
[[nodiscard]] DEEPEP_DEVICE uint32_t tokens_of_put(const RailDispatchCall& call, const uint64_t* words,
                                                   int word) {
  using namespace dev;
  uint32_t tokens = 0;
  DEEPEP_ROLLED
  for (int rank = 0; rank < call.domain.num_ranks; ++rank)
    tokens |= unpack_tagged(load(words + rank * call.args.slots.words().count() + word)).value;
  return tokens;
}

/// An entry of a record names its expert among those of the domain, whose gateway finds the rank.
[[nodiscard]] DEEPEP_DEVICE uint32_t entry_for(const RailDispatchCall& call, const HeaderDraft& draft,
                                               uint32_t own, int rank) {
  if (draft.owner < 0 || next_hop(call, draft.owner) != rank) return layout::kNoEntry;
  if (is_mapped(call, rank)) return own;
  return own + layout::pack_entry(local_index(call.domain, draft.owner) * call.args.num_local_experts, 0);
}

/// As inside a domain: all words and messages come into this rank's slots, by whomever.
DEEPEP_DEVICE void receive_messages(const RailDispatchCall& call) {
  LowLatencyDispatchCall within = call;
  receive_messages(within);
}

}  // namespace deepep::kernels
