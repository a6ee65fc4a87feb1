// One operation of many virtual ranks of a GPU, in one launch. A stream each, as fewer have it, is no way for
// more than 32: so many queues a GPU has for them, and in one queue a kernel waits for those before it.
#pragma once

#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels/two_level/args.hpp"

namespace deepep::virtual_ranks {

/// What ranks would have launched, by the order in which they came.
template <class Args>
struct Gathered {
  std::vector<Args> ranks;
  int num_blocks = 0;  // of each

  void add(const Args& args, int blocks) {
    if (!ranks.empty() && blocks != num_blocks) throw std::invalid_argument("ranks of different grids");
    num_blocks = blocks;
    ranks.push_back(args);
  }
};

/// Ranks' launches of an operation, until all have come. Made before any kernel runs: loading one, freeing
/// memory or copying from memory that is not pinned might have to wait for those that do, such as one that
/// serves puts until the operation has ended.
struct Launches {
  Launches();
  std::shared_ptr<void> memory;  // for a kernel's arguments of all ranks, on the device
  std::shared_ptr<void> staged;  // the same, pinned memory of the host
  Gathered<kernels::TwoLevelPrefixArgs> prefix;
  Gathered<kernels::TwoLevelDispatchArgs> dispatch;
  Gathered<kernels::TwoLevelCombineArgs> combine;
};

/// Launches what has come, and forgets it; returns when it has ended. All blocks have to be resident together.
void launch(Launches& launches, void* stream);

}  // namespace deepep::virtual_ranks
