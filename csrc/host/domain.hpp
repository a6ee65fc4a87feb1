// One rank's view of its NVLink domain, and the operations on it: the same for CUDA and for the emulator.
//
// A Domain turns a call (launches.hpp) into what a kernel is given (kernels/common/args.hpp); its launcher
// launches it: CudaLauncher (cuda_launcher.hpp) on a stream of the GPU, EmulatorLauncher
// (emulator/launcher.hpp) on the emulated machine. All memory is the caller's to keep alive.
//
// To add an operation: the kernel's arguments in kernels/, a call in launches.hpp, a method here that completes
// it, a method of that name in Launcher and both launchers, the arguments' names in bindings/domain.hpp, and
// the stubs deepep/_cuda.pyi and _emulator.pyi.
#pragma once

#include <concepts>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "host/launches.hpp"
#include "kernels/rows/args.hpp"

namespace deepep::host {

/// What a Domain asks of a launcher. It copies the arguments; it launches a rank's operations one after the
/// other.
template <class L>
concept Launcher = requires(L launcher, const kernels::Group& group, const kernels::DispatchArgs& dispatch,
                            const kernels::CombineArgs& combine, const kernels::LayoutArgs& layout,
                            const CombineLaunch& call, const RingLaunch& ring, int num_blocks, void* stream) {
  launcher.dispatch(dispatch, num_blocks, stream);
  launcher.combine(combine, call);
  launcher.layout(layout, num_blocks, stream);
  launcher.barrier(group, stream);
  launcher.ring_send(ring);
  launcher.ring_receive(ring);
  { launcher.take_fault(group, stream) } -> std::same_as<std::optional<kernels::FaultRecord>>;
};

/// A rank, the ranks it reaches, and the memory that all operations use.
struct DomainOptions {
  int rank = 0;
  std::vector<std::byte*> heaps;  // every rank's symmetric memory, as mapped here
  int max_local_experts = 0;
  int max_blocks = 0;
  int64_t staging_bytes = 0;
  kernels::LocalState* state = nullptr;
  kernels::FaultRecord* fault = nullptr;
  std::byte* counting = nullptr;  // layout::CountingLayout; null: no dispatch is by top-k alone
  double timeout_seconds = 0;
};

template <Launcher L>
class Domain {
 public:
  template <class... OfLauncher>
  explicit Domain(const DomainOptions& given, OfLauncher&&... of_launcher)
      : staging_bytes_(given.staging_bytes),
        counting_(given.counting),
        launcher_(std::forward<OfLauncher>(of_launcher)...) {
    const size_t num_ranks = given.heaps.size();
    if (num_ranks == 0 || num_ranks > layout::kMaxRanks)
      throw std::invalid_argument("an NVLink domain has 1 to 32 ranks");
    group_.rank = given.rank;
    group_.num_ranks = static_cast<int>(num_ranks);
    group_.live = 0xffffffffu >> (32 - num_ranks);
    group_.timeout_ns = static_cast<uint64_t>(given.timeout_seconds * 1e9);
    group_.control = layout::ControlLayout{group_.num_ranks, given.max_local_experts, given.max_blocks};
    group_.staging_offset = group_.control.bytes();
    for (size_t r = 0; r < num_ranks; ++r) group_.heap[r] = given.heaps[r];
    group_.state = given.state;
    group_.fault = given.fault;
  }

  /// Ranks that take part in the calls to come: bit r is rank r.
  void set_live(uint32_t live) { group_.live = live; }

  /// Where the calls to come add what they wait for each rank, [kNumKinds, R]; null: nowhere.
  void set_waits(int64_t* waits) { group_.waits = waits; }

  void dispatch(const DispatchLaunch& call) { launch(call, kernels::DispatchMode::kFresh); }

  /// The same where nothing is known of where tokens go but their top-k indices.
  void dispatch_topk(const DispatchLaunch& call) {
    if (counting_ == nullptr) throw std::invalid_argument("a domain without memory to count tokens in");
    if (call.args.num_tokens > int64_t{layout::kMaxStretches} * layout::kStretch)
      throw std::invalid_argument("more tokens than are counted inside of a dispatch");
    if (call.expanded == nullptr) return launch(call, kernels::DispatchMode::kTopk);
    if (call.args.num_local_experts * group_.num_ranks > layout::kMaxNumberedExperts ||
        call.args.num_topk > kernels::kMaxRowEntries || call.blocks.remote > layout::kMaxStreamBlocks ||
        call.blocks.remote + call.blocks.local != call.blocks.total || call.blocks.local < 1)
      throw std::invalid_argument("rows of 32 entries of 1024 experts are spread: from 32 blocks, by others");
    const bool has_columns = call.expanded->column_major && call.args.num_scales > 0;
    if (has_columns && call.expanded->recv_places != nullptr && call.expanded->tiles == nullptr)
      throw std::invalid_argument("scales by columns are spread in tiles, which are counted");
    launch(call, kernels::DispatchMode::kExpanded);
  }

  /// What `dispatch_cached` repeats: rows go where `counts` and `send_row` of a handle say, and no top-k
  /// travels.
  [[nodiscard]] CachedDispatch prepare_cached(const DispatchLaunch& call) const {
    check_roles(call.blocks);
    CachedDispatch prepared{.num_blocks = call.blocks.total, .args = call.args};
    prepared.args.push_blocks = call.blocks.remote;
    prepared.args.local_blocks = call.blocks.local;
    prepared.args.mode = kernels::DispatchMode::kCached;
    prepared.args.index_bytes = 8;
    return prepared;
  }

  /// The call whose host time counts most: only addresses are new, and who is live.
  void dispatch_cached(const CachedDispatch& prepared, const CachedRows& rows, void* stream) {
    kernels::DispatchArgs args = prepared.args;
    args.group = group_;
    args.x = rows.x;
    args.scales = rows.scales;
    args.slot[layout::kSlotRows] = offset(rows.recv_x);
    args.slot[layout::kSlotScales] = offset(rows.recv_scales);
    launcher_.dispatch(args, prepared.num_blocks, stream);
  }

  /// Posts to the others that this rank takes no part in a dispatch. `counts` [R, R]: a handle's, to be
  /// cleared.
  void refuse_dispatch(int32_t* counts, void* stream) {
    kernels::DispatchArgs args{};
    args.group = group_;
    args.mode = kernels::DispatchMode::kRefused;
    args.push_blocks = 1;
    args.local_blocks = 1;
    args.index_bytes = 8;
    args.row_bytes = 16;
    args.counts = counts;
    launcher_.dispatch(args, 1, stream);
  }

  void combine(const CombineLaunch& call) {
    if (call.blocks.local != call.blocks.total) check_roles(call.blocks);
    const bool fits = call.chunks.num_chunks == 0 && call.args.num_entries <= kernels::kMaxRowEntries;
    if (call.args.slots != nullptr && !fits)
      throw std::invalid_argument("expanded rows are summed by SMs, up to 32 entries a row");
    kernels::CombineArgs args = call.args;
    args.group = group_;
    args.mode = kernels::combine_mode(call.blocks.total, call.blocks.remote, call.blocks.local);
    args.push_blocks = call.blocks.remote;
    args.staging = layout::StagingLayout{staging_bytes_, args.row_bytes, args.num_topk};
    launcher_.combine(args, call);
  }

  /// The same of a combine. `counts` [R, R]: a handle's.
  void refuse_combine(const int32_t* counts, void* stream) {
    CombineLaunch call;
    call.stream = stream;
    call.args.group = group_;
    call.args.mode = kernels::CombineMode::kRefused;
    call.args.push_blocks = 1;
    call.args.row_bytes = 16;
    call.args.staging = layout::StagingLayout{staging_bytes_, call.args.row_bytes, 0};
    call.args.counts = counts;
    launcher_.combine(call.args, call);
  }

  /// Crosses no ranks.
  void layout(const LayoutLaunch& call) { launcher_.layout(call.args, call.num_blocks, call.stream); }

  void barrier(void* stream) { launcher_.barrier(group_, stream); }

  /// A copy engine's copy into the next slot at a neighbour, between two kernels: waits for the slot, signals.
  void ring_send(const RingLaunch& call) { launcher_.ring_send(completed(call)); }

  /// The same out of the next slot here: waits for the tensor, gives the slot back.
  void ring_receive(const RingLaunch& call) { launcher_.ring_receive(completed(call)); }

  /// The fault that was recorded since the last call. The record and the notes on the device are cleared,
  /// behind the operations launched so far.
  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(void* stream) {
    return launcher_.take_fault(group_, stream);
  }

  [[nodiscard]] const kernels::Group& group() const { return group_; }
  [[nodiscard]] L& launcher() { return launcher_; }

 private:
  [[nodiscard]] RingLaunch completed(const RingLaunch& given) const {
    const layout::RingSlots& slots = given.args.slots;
    if (given.args.peer < 0 || given.args.peer >= group_.num_ranks || given.args.peer == group_.rank ||
        given.args.slot < 0 || given.args.slot >= slots.num_slots)
      throw std::invalid_argument("a slot of a neighbour");
    if (given.bytes < 0 || given.bytes > slots.slot_bytes || given.bytes >> 48 != 0 || given.dtype > 255)
      throw std::invalid_argument("a tensor that fits into a slot, and a dtype below 256");
    RingLaunch call = given;
    call.args.group = group_;
    call.args.kind = kernels::ring_kind(static_cast<uint64_t>(call.bytes), call.dtype);
    return call;
  }

  void launch(const DispatchLaunch& call, kernels::DispatchMode mode) {
    check_roles(call.blocks);
    kernels::DispatchArgs args = call.args;
    args.group = group_;
    args.mode = mode;
    args.push_blocks = call.blocks.remote;
    args.local_blocks = call.blocks.local;
    args.counting = counting_;
    for (int array = 0; array < layout::kSlotArrays; ++array) args.slot[array] = offset(call.received[array]);
    if (mode == kernels::DispatchMode::kExpanded) {
      args.expanded = *call.expanded;
      args.slot[layout::kSlotPlaces] = offset(args.expanded.recv_places);
    }
    launcher_.dispatch(args, call.blocks.total, call.stream);
  }

  static void check_roles(const Blocks& blocks) {
    const bool all_of_both = blocks.remote == blocks.total && blocks.local == blocks.total;
    if (blocks.total < 1 || (blocks.remote + blocks.local != blocks.total && !all_of_both))
      throw std::invalid_argument("blocks of two kinds must be disjoint, or all of both");
  }

  /// Where in this rank's heap; 0 for nowhere.
  [[nodiscard]] int64_t offset(const std::byte* address) const {
    return address == nullptr ? 0 : address - group_.heap[group_.rank];
  }

  kernels::Group group_{};
  int64_t staging_bytes_;
  std::byte* counting_;
  L launcher_;
};

}  // namespace deepep::host
