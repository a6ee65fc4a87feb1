// Dispatch layout on the device: counts per rank, domain and expert, and which ranks each token goes to.
//
// Phases:
//   count_tokens   a thread a token: marks its ranks, counts in shared memory; each block adds its sums to the
//                  workspace
//   is_last_block  each block takes a ticket
//   write_totals   the block with the last ticket, and leaves the workspace zero for the next call
#pragma once

#include "kernels/common/group.hpp"
#include "layout/placement.hpp"

namespace deepep::kernels {

/// Tokens are marked rank by rank through a 64-bit mask, a window of ranks at a time.
template <class Index>
DEEPEP_DEVICE void mark_ranks(const LayoutArgs& args, const layout::Placement& placement, const Index* row,
                              int64_t t) {
  using namespace dev;
  for (int first = 0; first < args.num_ranks; first += 64) {
    uint64_t mask = 0;
    for (int k = 0; k < args.num_topk; ++k) {
      const Index entry = load_once(row + k);
      if (!placement.is_expert(entry)) continue;
      const int rank = placement.rank_of_expert(static_cast<int32_t>(entry)) - first;
      if (rank >= 0 && rank < 64) mask |= uint64_t{1} << rank;
    }
    const int end = args.num_ranks - first < 64 ? args.num_ranks - first : 64;
    for (int r = 0; r < end; ++r)
      store(args.is_token_in_rank + t * args.num_ranks + first + r, static_cast<uint8_t>((mask >> r) & 1u));
  }
}

/// Those that are counted: domains only if there are several.
[[nodiscard]] DEEPEP_DEVICE int num_domains(const LayoutArgs& args, const layout::Placement& placement) {
  return args.tokens_per_domain != nullptr ? placement.num_domains() : 0;
}

/// Experts, ranks and domains: so many counts.
[[nodiscard]] DEEPEP_DEVICE int num_counts(const LayoutArgs& args) {
  const layout::Placement placement(args.num_experts, args.num_ranks, args.ranks_per_domain);
  return args.num_experts + args.num_ranks + num_domains(args, placement);
}

template <class Index>
DEEPEP_DEVICE void count_tokens(const LayoutArgs& args, const Index* topk_idx) {
  using namespace dev;
  const layout::Placement placement(args.num_experts, args.num_ranks, args.ranks_per_domain);
  const int domains = num_domains(args, placement);
  SharedArray<uint32_t> totals(0);  // [E] experts, [R] ranks, [domains]
  const int total = args.num_experts + args.num_ranks + domains;
  for (int i = thread(); i < total; i += num_threads()) totals.set(i, 0);
  sync_block();
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_threads();
  for (int64_t t = static_cast<int64_t>(block()) * num_threads() + thread(); t < args.num_tokens; t += step) {
    const Index* row = topk_idx + t * args.num_topk;
    mark_ranks(args, placement, row, t);
    for (int k = 0; k < args.num_topk; ++k) {
      const Index entry = load_once(row + k);
      if (!placement.is_expert(entry)) continue;
      const int32_t expert = static_cast<int32_t>(entry);
      const int rank = placement.rank_of_expert(expert);
      totals.add(expert, 1u);
      if (layout::is_first_of_rank(row, k, placement)) totals.add(args.num_experts + rank, 1u);
      if (domains > 0 && layout::is_first_of_domain(row, k, placement))
        totals.add(args.num_experts + args.num_ranks + placement.domain_of_rank(rank), 1u);
    }
  }
  sync_block();
  for (int i = thread(); i < total; i += num_threads()) {
    const uint32_t count = totals.get(i);
    if (count != 0) fetch_add<relaxed, gpu_scope>(args.workspace + i, count);
  }
}

DEEPEP_DEVICE void count_tokens(const LayoutArgs& args) {
  if (args.index_bytes == 8)
    count_tokens(args, static_cast<const int64_t*>(args.topk_idx));
  else
    count_tokens(args, static_cast<const int32_t*>(args.topk_idx));
}

/// Whether all other blocks have added their sums. Whole block.
[[nodiscard]] DEEPEP_DEVICE bool is_last_block(const LayoutArgs& args) {
  using namespace dev;
  const int total = num_counts(args);
  SharedArray<uint32_t> last(4 * static_cast<int64_t>(total));
  sync_block();  // this block's sums come before its arrival
  if (thread() == 0)
    last.set(0, fetch_add<acq_rel, gpu_scope>(args.workspace + total, 1u) + 1 ==
                    static_cast<uint32_t>(num_blocks()));
  sync_block();
  return last.get(0) != 0;
}

DEEPEP_DEVICE void write_totals(const LayoutArgs& args) {
  using namespace dev;
  const int total = num_counts(args);
  for (int i = thread(); i < total; i += num_threads()) {
    const int32_t count = static_cast<int32_t>(load<relaxed, gpu_scope>(args.workspace + i));
    store<relaxed, gpu_scope>(args.workspace + i, 0u);
    if (i < args.num_experts)
      store(args.tokens_per_expert + i, count);
    else if (i < args.num_experts + args.num_ranks)
      store(args.tokens_per_rank + i - args.num_experts, count);
    else
      store(args.tokens_per_domain + i - args.num_experts - args.num_ranks, count);
  }
  if (thread() == 0) store<relaxed, gpu_scope>(args.workspace + total, 0u);  // the tickets
}

DEEPEP_KERNEL(layout_kernel, LayoutArgs, kThreads) {
  count_tokens(args);
  if (is_last_block(args)) write_totals(args);
}

}  // namespace deepep::kernels
