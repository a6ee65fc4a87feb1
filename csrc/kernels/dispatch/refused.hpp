// A dispatch that this rank refuses: it takes no part, but the others must not wait for it, and learn that it
// refused. One block.
//
// Phases:
//   start          reads the epoch
//   post_metadata  no counts, and a refusal in place of the digest, to every rank
//   assign_tokens  of the handle's rows, all
//   wait_metadata  the others have begun this call, too; it never succeeds
//   clear_handle   a combine queued behind it does no harm
//   grant_credit   peers may write to this rank's combine staging
//   advance_epoch  so that this rank counts its calls as the others do
//   finish         looks for what went wrong: a refusal always does
//   report_fault   one thread
#pragma once

#include "kernels/dispatch/handle.hpp"

namespace deepep::kernels {

DEEPEP_KERNEL(dispatch_refused_kernel, DispatchArgs, kDispatchThreads) {
  using namespace dev;
  constexpr DispatchMode kMode = DispatchMode::kRefused;
  const DispatchCall call = start(args);
  sync_block();
  post_metadata<kMode>(call);
  const WarpShare share = assign_tokens(call);
  if (wait_metadata<kMode>(call) != 0) clear_handle(call, share);
  grant_credit(call);
  advance_epoch(call);
  if (finish(call)) report_fault(call.g, Operation::kDispatch);
}

}  // namespace deepep::kernels
