// Launches of a LowLatencyDomain's operations on a GPU, in turns with the rank's other operations.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "host/line_room.hpp"
#include "host/low_latency.hpp"
#include "host/turns.hpp"
#include "kernels/low_latency/launch.hpp"

namespace deepep::host {

/// Of one rank, on the device that is current when it is made, which is that of its turns.
class CudaLowLatencyLauncher {
 public:
  explicit CudaLowLatencyLauncher(std::shared_ptr<Turns> turns)
      : turns_(std::move(turns)), block_size_(kernels::load_low_latency()) {}

  [[nodiscard]] const kernels::BlockSize& block_size() const { return block_size_; }

  template <class Args>
  void start(const Args& args, int num_blocks, Halves halves, void* stream) {
    kernels::Lines lines;
    if (lines_.is_open())  // none of a launch that is captured: a graph outlives the room
      lines = lines_.take(name_of(args), num_blocks, block_size_.num_warps,
                          records(args, halves) && !is_capturing(static_cast<cudaStream_t>(stream)));
    if (turns_->take(stream, [&] { kernels::launch_low_latency(args, num_blocks, halves, stream, lines); }))
      was_captured_ = true;
  }

  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream) {
    return host::take_fault(group, *turns_, stream);
  }

  [[nodiscard]] Turns& turns() { return *turns_; }
  [[nodiscard]] LineRoom& lines() { return lines_; }

  /// True once a launch was captured: graphs hold the addresses of this domain's memory.
  [[nodiscard]] bool was_captured() const { return was_captured_; }

 private:
  std::shared_ptr<Turns> turns_;
  kernels::BlockSize block_size_;
  LineRoom lines_;
  bool was_captured_ = false;
};

}  // namespace deepep::host
