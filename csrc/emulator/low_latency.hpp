// Launches of the low-latency operations on the emulated machine.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "emulator/run/simulation.hpp"
#include "host/line_room.hpp"
#include "host/low_latency.hpp"
#include "host/low_latency_far.hpp"
#include "kernels/low_latency/combine.hpp"
#include "kernels/low_latency/combine_exact.hpp"
#include "kernels/low_latency/combine_exact_logfmt.hpp"
#include "kernels/low_latency/combine_exact_logfmt_receive.hpp"
#include "kernels/low_latency/combine_exact_logfmt_send.hpp"
#include "kernels/low_latency/combine_exact_receive.hpp"
#include "kernels/low_latency/combine_exact_send.hpp"
#include "kernels/low_latency/combine_logfmt.hpp"
#include "kernels/low_latency/combine_logfmt_receive.hpp"
#include "kernels/low_latency/combine_logfmt_send.hpp"
#include "kernels/low_latency/combine_receive.hpp"
#include "kernels/low_latency/combine_send.hpp"
#include "kernels/low_latency/dispatch.hpp"
#include "kernels/low_latency/dispatch_receive.hpp"
#include "kernels/low_latency/dispatch_send.hpp"
#include "kernels/low_latency_far/combine.hpp"
#include "kernels/low_latency_far/combine_exact.hpp"
#include "kernels/low_latency_far/combine_exact_receive.hpp"
#include "kernels/low_latency_far/combine_exact_send.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt_receive.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt_send.hpp"
#include "kernels/low_latency_far/combine_logfmt.hpp"
#include "kernels/low_latency_far/combine_logfmt_receive.hpp"
#include "kernels/low_latency_far/combine_logfmt_send.hpp"
#include "kernels/low_latency_far/combine_receive.hpp"
#include "kernels/low_latency_far/combine_send.hpp"
#include "kernels/low_latency_far/dispatch.hpp"
#include "kernels/low_latency_far/dispatch_receive.hpp"
#include "kernels/low_latency_far/dispatch_send.hpp"
#include "kernels/low_latency_rails/combine.hpp"
#include "kernels/low_latency_rails/dispatch.hpp"

namespace deepep::emu {

/// A block's shared memory on GPUs with bulk copies.
inline constexpr int kBulkBytes = 227 * 1024;

/// Of one rank. num_threads: per block; fewer than on hardware, for cheap schedules. bulk_copies: its GPU
/// has some.
class LowLatencyLauncher {
 public:
  LowLatencyLauncher(Simulation& machine, const KernelSet& kernels, int rank, int num_threads, bool bulk_copies)
      : machine_(machine),
        kernels_(kernels),
        rank_(rank),
        num_threads_(num_threads),
        bulk_copies_(bulk_copies) {}

  [[nodiscard]] kernels::BlockSize block_size() const {
    return {.num_warps = num_threads_ / dev::kWarpSize, .bulk_bytes = bulk_copies_ ? kBulkBytes : 0};
  }

  void start(const kernels::LowLatencyDispatchArgs& args, int num_blocks, host::Halves halves, void*) {
    launch_lines("low_latency_dispatch", args, num_blocks, halves, kernels::shared_of(args).bytes());
  }
  void start(const kernels::LowLatencyCombineArgs& args, int num_blocks, host::Halves halves, void*) {
    launch_lines("low_latency_" + combine_of(args), args, num_blocks, halves, kernels::shared_of(args).bytes());
  }

  void start(const kernels::FarDispatchArgs& args, int num_blocks, host::Halves halves, void*) {
    launch("low_latency_far_dispatch", args, num_blocks, halves, kernels::far_shared_of(args).bytes());
  }
  void start(const kernels::FarCombineArgs& args, int num_blocks, host::Halves halves, void*) {
    const int64_t shared_bytes = kernels::far_shared_of(args).bytes();
    launch("low_latency_far_" + combine_of(args), args, num_blocks, halves, shared_bytes);
  }

  void start(const kernels::RailDispatchArgs& args, int num_blocks, host::Halves halves, void*) {
    launch("low_latency_rail_dispatch", args, num_blocks, halves, kernels::far_shared_of(args).bytes());
  }
  void start(const kernels::RailCombineArgs& args, int num_blocks, host::Halves halves, void*) {
    launch("low_latency_rail_combine", args, num_blocks, halves, kernels::rail_shared_of(args).bytes());
  }

  /// `watched`: while a kernel runs; the record then stays. Otherwise it is taken: the rank's stream must be
  /// idle.
  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, bool watched) {
    kernels::FaultRecord record;
    const auto address = reinterpret_cast<uintptr_t>(group.fault);
    if (watched)
      machine_.watcher_read(rank_, address, &record, sizeof(record));
    else
      machine_.host_read(rank_, address, &record, sizeof(record));
    if (record.pending == 0) return std::nullopt;
    if (watched) return record;
    const uint32_t none = 0;
    machine_.host_write(rank_, reinterpret_cast<uintptr_t>(&group.fault->pending), &none, sizeof(none));
    const std::vector<std::byte> zeros(sizeof(kernels::LocalState) - offsetof(kernels::LocalState, phase));
    machine_.host_write(rank_, reinterpret_cast<uintptr_t>(&group.state->phase), zeros.data(), zeros.size());
    return record;
  }

  [[nodiscard]] host::LineRoom& lines() { return lines_; }

  /// Ranks that kernels have masked, as bits. The rank's stream must be idle.
  [[nodiscard]] uint32_t masked(const kernels::Group& group) {
    uint32_t masked = 0;
    machine_.host_read(rank_, reinterpret_cast<uintptr_t>(&group.fault->masked), &masked, sizeof(masked));
    return masked;
  }

 private:
  [[nodiscard]] static std::string combine_of(const kernels::LowLatencyCombineArgs& args) {
    static constexpr const char* kNames[] = {"combine", "combine_logfmt", "combine_exact",
                                             "combine_exact_logfmt"};
    return kNames[static_cast<int>(args.returned)];
  }

  /// In the form that records, if there is one, and room.
  template <class Args>
  void launch_lines(const std::string& kernel, const Args& args, int num_blocks, host::Halves halves,
                    int64_t shared_bytes) {
    const int num_warps = num_threads_ / dev::kWarpSize;
    const bool records = kernels::records(args, halves);
    const kernels::Lines lines = lines_.take(host::name_of(args), num_blocks, num_warps, records);
    if (lines.words == nullptr) return launch(kernel, args, num_blocks, halves, shared_bytes);
    const kernels::Recorded<Args> recorded{args, lines};
    machine_.launch(rank_, kernels_, kernel + "_kernel_recorded", &recorded, sizeof(recorded),
                    num_blocks, num_threads_, shared_bytes);
  }

  template <class Args>
  void launch(std::string kernel, const Args& args, int num_blocks, host::Halves halves, int64_t shared_bytes) {
    if (halves == host::Halves::kSend) kernel += "_send";
    if (halves == host::Halves::kReceive) kernel += "_receive";
    machine_.launch(rank_, kernels_, kernel + "_kernel", &args, sizeof(args), num_blocks, num_threads_,
                    shared_bytes);
  }

  Simulation& machine_;
  const KernelSet& kernels_;
  int rank_;
  int num_threads_;
  bool bulk_copies_;
  host::LineRoom lines_;
};

}  // namespace deepep::emu
