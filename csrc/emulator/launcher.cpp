#include "emulator/launcher.hpp"

#include <cstddef>
#include <stdexcept>
#include <vector>

#include "emulator/copy_engine.hpp"
#include "kernels/barrier/barrier.hpp"
#include "kernels/combine/call.hpp"
#include "kernels/dispatch/metadata.hpp"

namespace deepep::emu {

namespace {

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

const uint32_t* word(const std::byte* at) { return reinterpret_cast<const uint32_t*>(at); }

}  // namespace

EmulatorLauncher::EmulatorLauncher(Simulation& machine, const KernelSet& kernels, int rank, int num_threads)
    : machine_(machine), kernels_(kernels), rank_(rank), num_threads_(num_threads) {
  if (num_threads < 64) throw std::invalid_argument("a block of a combine has two warps or more");
}

template <class Args>
void EmulatorLauncher::launch(const std::string& kernel, const Args& args, void* stream, const Grid& grid) {
  if (stream != nullptr) throw std::invalid_argument("stream: a rank of the emulator has one, 0");
  machine_.launch(rank_, kernels_, kernel, &args, sizeof(args), grid.blocks, grid.threads, grid.shared_bytes);
}

template <class Args>
void EmulatorLauncher::launch_lines(const char* operation, const std::string& kernel, const Args& args,
                                    void* stream, const Grid& grid, bool records) {
  const kernels::Lines lines = lines_.take(operation, grid.blocks, grid.threads / dev::kWarpSize, records);
  if (lines.words == nullptr) return launch(kernel, args, stream, grid);
  launch(kernel + "_recorded", kernels::Recorded<Args>{args, lines}, stream, grid);
}

void EmulatorLauncher::dispatch(const kernels::DispatchArgs& given, int num_blocks, void* stream) {
  const auto kernel_of = [](kernels::DispatchMode mode) {
    switch (mode) {
      case kernels::DispatchMode::kCached: return "dispatch_cached_kernel";
      case kernels::DispatchMode::kRefused: return "dispatch_refused_kernel";
      case kernels::DispatchMode::kTopk: return "dispatch_topk_kernel";
      case kernels::DispatchMode::kExpanded: return "dispatch_expanded_kernel";
      default: return "dispatch_kernel";
    }
  };
  kernels::DispatchArgs args = given;
  prepare(args, num_blocks, num_threads_ / 32);
  const Grid grid{.blocks = num_blocks,
                  .threads = num_threads_,
                  .shared_bytes = kernels::shared_bytes(args, num_threads_ / 32)};
  launch_lines("dispatch", kernel_of(args.mode), args, stream, grid, kernels::records(args.mode));
}

void EmulatorLauncher::combine(const kernels::CombineArgs& given, const host::CombineLaunch& call) {
  const Grid grid{.blocks = call.blocks.total,
                  .threads = num_threads_,
                  .shared_bytes = kernels::CombineShared{given.group.num_ranks}.bytes()};
  const auto launch_one = [&](const char* kernel, const kernels::CombineArgs& args) {
    launch_lines("combine", kernel, args, call.stream, grid, kernels::records(args));
  };
  if (given.mode == kernels::CombineMode::kRefused) return launch_one("combine_refused_kernel", given);
  if (given.slots != nullptr) return launch_one("combine_expanded_kernel", given);
  if (call.chunks.num_chunks == 0) return launch_one("combine_kernel", given);
  ce_ticket_ += static_cast<uint32_t>(call.chunks.num_chunks);
  kernels::CombineArgs args = given;
  args.mode = kernels::CombineMode::kCopyEngine;
  args.copy_engine = {call.chunks, ce_ticket_};
  launch_one("combine_copy_engine_kernel", args);
  const CopyEngineArgs orders{args, 100 * args.group.timeout_ns};
  const int copy_engine = args.group.num_ranks + rank_;
  machine_.launch(copy_engine, kernels_, "copy_engine_kernel", &orders, sizeof(orders), 1, 32, 0);
}

/// By blocks of one warp, so that fewer tokens reach a second block, and a thread's second turn.
void EmulatorLauncher::layout(const kernels::LayoutArgs& args, int num_blocks, void* stream) {
  const int64_t domains = layout::ceil_div(args.num_ranks, args.ranks_per_domain);
  const int64_t shared_bytes = 4 * (args.num_experts + args.num_ranks + domains + 4);
  launch("layout_kernel", args, stream, {.blocks = num_blocks, .threads = 32, .shared_bytes = shared_bytes});
}

void EmulatorLauncher::barrier(const kernels::Group& group, void* stream) {
  launch("barrier_kernel", kernels::BarrierArgs{group}, stream,
         {.blocks = 1, .threads = num_threads_, .shared_bytes = 16});
}

void EmulatorLauncher::ring_send(const host::RingLaunch& call) {
  const Grid one_warp{.blocks = 1, .threads = kernels::kRingThreads, .shared_bytes = 0};
  const layout::RingSlots& slots = call.args.slots;
  const kernels::Group& g = call.args.group;
  const int way = layout::RingSlots::way(g.rank, call.args.peer, g.num_ranks);
  const int peers_way = layout::RingSlots::way(call.args.peer, g.rank, g.num_ranks);
  launch("ring_before_send_kernel", call.args, call.stream, one_warp);
  const RingCopyArgs copy{.from = call.tensor,
                          .to = g.heap[call.args.peer] + slots.tensor(peers_way, call.args.slot),
                          .bytes = call.bytes,
                          .broken = word(g.heap[g.rank] + slots.sends_broken(way)),
                          .sends = true};
  launch("ring_copy_kernel", copy, call.stream, one_warp);
  launch("ring_behind_send_kernel", call.args, call.stream, one_warp);
}

void EmulatorLauncher::ring_receive(const host::RingLaunch& call) {
  const Grid one_warp{.blocks = 1, .threads = kernels::kRingThreads, .shared_bytes = 0};
  const layout::RingSlots& slots = call.args.slots;
  const kernels::Group& g = call.args.group;
  const int way = layout::RingSlots::way(g.rank, call.args.peer, g.num_ranks);
  launch("ring_before_receive_kernel", call.args, call.stream, one_warp);
  const RingCopyArgs copy{.from = g.heap[g.rank] + slots.tensor(way, call.args.slot),
                          .to = call.tensor,
                          .bytes = call.bytes,
                          .broken = word(g.heap[g.rank] + slots.receives_broken(way)),
                          .sends = false};
  launch("ring_copy_kernel", copy, call.stream, one_warp);
  launch("ring_behind_receive_kernel", call.args, call.stream, one_warp);
}

std::optional<kernels::FaultRecord> EmulatorLauncher::take_fault(const kernels::Group& group, void*) {
  kernels::FaultRecord record;
  machine_.host_read(rank_, address(group.fault), &record, sizeof(record));
  if (record.pending == 0) return std::nullopt;
  const uint32_t none = 0;
  machine_.host_write(rank_, address(&group.fault->pending), &none, sizeof(none));
  const std::vector<std::byte> zeros(sizeof(kernels::LocalState) - offsetof(kernels::LocalState, phase));
  machine_.host_write(rank_, address(&group.state->phase), zeros.data(), zeros.size());
  return record;
}

std::optional<kernels::FaultRecord> EmulatorLauncher::watched_fault(const kernels::Group& group) {
  kernels::FaultRecord record;
  machine_.watcher_read(rank_, address(group.fault), &record, sizeof(record));
  if (record.pending == 0) return std::nullopt;
  return record;
}

bool EmulatorLauncher::ce_doorbell_rung(const kernels::Group& group) {
  uint32_t ticket = 0;
  machine_.host_read(rank_, address(&group.state->ce_doorbell), &ticket, sizeof(ticket));
  return static_cast<int32_t>(ticket - ce_ticket_) >= 0;
}

}  // namespace deepep::emu
