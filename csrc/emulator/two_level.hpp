// Launches of the two-level operations on the emulated machine.
#pragma once

#include "emulator/launcher.hpp"
#include "host/two_level.hpp"
#include "kernels/two_level/combine_call.hpp"
#include "kernels/two_level/dispatch_call.hpp"

namespace deepep::emu {

/// Of one rank; see EmulatorLauncher.
class TwoLevelLauncher {
 public:
  TwoLevelLauncher(Simulation& machine, const KernelSet& kernels, int rank, int num_threads)
      : machine_(machine),
        kernels_(kernels),
        rank_(rank),
        num_threads_(num_threads),
        within_(machine, kernels, rank, num_threads) {}

  void prefix(const kernels::TwoLevelPrefixArgs& args, void*) {
    launch("two_level_prefix_kernel", args, 1, 16);
  }
  void dispatch(kernels::TwoLevelDispatchArgs args, int num_blocks, void*) {
    prepare(args, num_blocks, num_threads_ / dev::kWarpSize);
    const bool is_cached = args.dispatch.mode == kernels::DispatchMode::kCached;
    launch(is_cached ? "two_level_dispatch_cached_kernel" : "two_level_dispatch_kernel", args, num_blocks,
           kernels::shared_bytes(args));
  }
  void combine(const kernels::TwoLevelCombineArgs& args, int num_blocks, void*) {
    launch("two_level_combine_kernel", args, num_blocks,
           kernels::shared_of(args).bytes());
  }
  void layout(const kernels::LayoutArgs& args, int num_blocks, void* stream) {
    within_.layout(args, num_blocks, stream);
  }
  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream) {
    return within_.take_fault(group, stream);
  }
  [[nodiscard]] std::optional<kernels::FaultRecord> watched_fault(const kernels::Group& group) {
    return within_.watched_fault(group);
  }

 private:
  template <class Args>
  void launch(const char* kernel, const Args& args, int num_blocks, int64_t shared_bytes) {
    machine_.launch(rank_, kernels_, kernel, &args, sizeof(args), num_blocks, num_threads_, shared_bytes);
  }

  Simulation& machine_;
  const KernelSet& kernels_;
  int rank_;
  int num_threads_;
  EmulatorLauncher within_;
};

}  // namespace deepep::emu
