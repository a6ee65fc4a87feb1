// Adds the number of each expert's top-k entries to its load.
//
// Phases:
//   clear_counts
//   count_topk   each thread some entries, in the block's shared memory
//   add_counts   to the load
#pragma once

#include "device/device.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::kernels {

inline constexpr int kCountThreads = 1024;

DEEPEP_DEVICE void clear_counts(const CountEntriesArgs& args) {
  using namespace dev;
  SharedArray<uint32_t> counts(0);
  for (int e = thread(); e < args.num_experts; e += num_threads()) counts.set(e, 0);
}

template <class Index>
DEEPEP_DEVICE void count_indices(const CountEntriesArgs& args, const Index* topk_idx) {
  using namespace dev;
  SharedArray<uint32_t> counts(0);
  const int64_t step = static_cast<int64_t>(num_blocks()) * num_threads();
  for (int64_t i = static_cast<int64_t>(block()) * num_threads() + thread(); i < args.num_entries; i += step) {
    const Index entry = load_once(topk_idx + i);
    if (entry >= 0 && entry < args.num_experts) counts.add(static_cast<int>(entry), 1u);
  }
}

DEEPEP_DEVICE void count_topk(const CountEntriesArgs& args) {
  if (args.index_bytes == 8)
    count_indices(args, static_cast<const int64_t*>(args.topk_idx));
  else
    count_indices(args, static_cast<const int32_t*>(args.topk_idx));
}

DEEPEP_DEVICE void add_counts(const CountEntriesArgs& args) {
  using namespace dev;
  const SharedArray<uint32_t> counts(0);
  for (int e = thread(); e < args.num_experts; e += num_threads())
    if (counts.get(e) != 0) fetch_add<relaxed, gpu_scope>(args.load + e, counts.get(e));
}

DEEPEP_KERNEL(count_entries_kernel, CountEntriesArgs, kCountThreads) {
  using namespace dev;
  clear_counts(args);
  sync_block();
  count_topk(args);
  sync_block();
  add_counts(args);
}

}  // namespace deepep::kernels
