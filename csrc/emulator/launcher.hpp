// Launches of a Domain's operations on the emulated machine: kernels go to the rank's stream, or to its copy
// engine's.
#pragma once

#include <optional>
#include <string>

#include "emulator/run/simulation.hpp"
#include "host/launches.hpp"
#include "host/line_room.hpp"

namespace deepep::emu {

/// Of one rank. num_threads: per block; fewer than on hardware, so that schedules are cheap.
class EmulatorLauncher {
 public:
  EmulatorLauncher(Simulation& machine, const KernelSet& kernels, int rank, int num_threads);

  void dispatch(const kernels::DispatchArgs& args, int num_blocks, void* stream);
  /// A copy engine returns the rows whenever it is asked to: the machine carries out its orders as a kernel,
  /// which knows the counts.
  void combine(const kernels::CombineArgs& args, const host::CombineLaunch& call);
  void layout(const kernels::LayoutArgs& args, int num_blocks, void* stream);
  void barrier(const kernels::Group& group, void* stream);
  /// The copies in between are kernels here, which do what a copy engine does.
  void ring_send(const host::RingLaunch& call);
  void ring_receive(const host::RingLaunch& call);
  [[nodiscard]] host::LineRoom& lines() { return lines_; }

  /// The rank's stream must be idle.
  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream);
  /// The fault record while a kernel runs, which stays: once the rank's host has seen its `pending` become 1.
  [[nodiscard]] std::optional<kernels::FaultRecord> watched_fault(const kernels::Group& group);
  /// Whether the copy engine's doorbell was rung for all that it was ordered. The rank's stream must be idle.
  [[nodiscard]] bool ce_doorbell_rung(const kernels::Group& group);

 private:
  struct Grid {
    int blocks;
    int threads;
    int64_t shared_bytes;
  };
  template <class Args>
  void launch(const std::string& kernel, const Args& args, void* stream, const Grid& grid);
  /// The form that records, if there is room.
  template <class Args>
  void launch_lines(const char* operation, const std::string& kernel, const Args& args, void* stream,
                    const Grid& grid, bool records);

  Simulation& machine_;
  const KernelSet& kernels_;
  int rank_;
  int num_threads_;
  uint32_t ce_ticket_ = 0;
  host::LineRoom lines_;
};

}  // namespace deepep::emu
