// Launches of a Domain's operations on a GPU: on the caller's streams, in turns, with a copy engine where it
// helps.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "host/copy_engine.hpp"
#include "host/launches.hpp"
#include "host/line_room.hpp"
#include "host/turns.hpp"
#include "kernels/common/launch.hpp"
#include "kernels/ring/launch.hpp"

namespace deepep::host {

/// Of one rank, on the device that is current when it is made, which is that of its turns.
class CudaLauncher {
 public:
  explicit CudaLauncher(std::shared_ptr<Turns> turns) : turns_(std::move(turns)) {
    kernels::load_dispatch();
    kernels::load_combine();
    kernels::load_ring();
  }

  void dispatch(const kernels::DispatchArgs& args, int num_blocks, void* stream) {
    const kernels::Lines lines = take_lines("dispatch", num_blocks, stream, records(args.mode));
    in_turn(stream, [&] { kernels::launch_dispatch(args, num_blocks, stream, lines); });
  }

  void combine(kernels::CombineArgs args, const CombineLaunch& call) {
    const int num_blocks = call.blocks.total;
    // A graph would replay the kernel without its orders; a launch that returns only when the kernel has ended
    // would never let them be given.
    const bool by_copy_engine = call.chunks.num_chunks > 0 && call.known != nullptr && !launches_block_ &&
                                !is_capturing(static_cast<cudaStream_t>(call.stream)) &&
                                CopyEngine::has_room(args, call.known->counts.data());
    const kernels::Lines lines = take_lines("combine", num_blocks, call.stream, records(args));
    in_turn(call.stream, [&] {
      if (!by_copy_engine) return kernels::launch_combine(args, num_blocks, call.stream, lines);
      if (!copy_engine_) copy_engine_ = std::make_unique<CopyEngine>();
      args.mode = kernels::CombineMode::kCopyEngine;
      args.copy_engine = copy_engine_->take(call.chunks);
      kernels::launch_combine(args, num_blocks, call.stream, lines);
      copy_engine_->order(args, call.known->counts.data());
    });
  }

  void layout(const kernels::LayoutArgs& args, int num_blocks, void* stream) {
    in_turn(stream, [&] { kernels::launch_layout(args, num_blocks, stream); });
  }

  void barrier(const kernels::Group& group, void* stream) {
    in_turn(stream, [&] { kernels::launch_barrier(group, stream); });
  }

  void ring_send(const RingLaunch& call) {
    using kernels::RingStep;
    const kernels::RingArgs& args = call.args;
    const kernels::Group& g = args.group;
    const int way = layout::RingSlots::way(args.peer, g.rank, g.num_ranks);
    in_turn(call.stream, [&] {
      kernels::launch_ring(args, RingStep::kBeforeSend, call.stream);
      copy(g.heap[args.peer] + args.slots.tensor(way, args.slot), call.tensor, call);
      kernels::launch_ring(args, RingStep::kBehindSend, call.stream);
    });
  }

  void ring_receive(const RingLaunch& call) {
    using kernels::RingStep;
    const kernels::RingArgs& args = call.args;
    const kernels::Group& g = args.group;
    const int way = layout::RingSlots::way(g.rank, args.peer, g.num_ranks);
    in_turn(call.stream, [&] {
      kernels::launch_ring(args, RingStep::kBeforeReceive, call.stream);
      copy(call.tensor, g.heap[g.rank] + args.slots.tensor(way, args.slot), call);
      kernels::launch_ring(args, RingStep::kBehindReceive, call.stream);
    });
  }

  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream) {
    return host::take_fault(group, *turns_, stream);
  }

  [[nodiscard]] Turns& turns() { return *turns_; }
  [[nodiscard]] LineRoom& lines() { return lines_; }

  /// True once a launch was captured: graphs hold the addresses of this domain's memory.
  [[nodiscard]] bool was_captured() const { return was_captured_; }

  /// Whether the copy engine still has rows to write: it may, behind a combine that has given it up.
  [[nodiscard]] bool has_copies_under_way() const {
    return copy_engine_ != nullptr && !is_idle(copy_engine_->stream());
  }

 private:
  [[nodiscard]] static bool has_blocking_launches() {
    const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
    return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
  }

  static void copy(std::byte* to, const std::byte* from, const RingLaunch& call) {
    if (call.bytes == 0) return;
    kernels::check(cudaMemcpyAsync(to, from, static_cast<size_t>(call.bytes), cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(call.stream)),
                   "cudaMemcpyAsync");
  }

  /// None of a launch that is captured: a graph outlives the room.
  [[nodiscard]] kernels::Lines take_lines(const char* kernel, int num_blocks, void* stream, bool can) {
    if (!lines_.is_open()) return {};
    const bool records = can && !is_capturing(static_cast<cudaStream_t>(stream));
    return lines_.take(kernel, num_blocks, kernels::kThroughputWarps, records);
  }

  template <class Launch>
  void in_turn(void* stream, const Launch& launch) {
    if (turns_->take(stream, launch)) was_captured_ = true;
  }

  std::shared_ptr<Turns> turns_;
  std::unique_ptr<CopyEngine> copy_engine_;  // once a combine leaves rows to it
  LineRoom lines_;
  bool was_captured_ = false;
  bool launches_block_ = has_blocking_launches();
};

}  // namespace deepep::host
