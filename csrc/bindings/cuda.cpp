// deepep._cuda: launches of the kernels for Python. Addresses, sizes and a stream; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "layout/symmetric_layout.hpp"
#include "host/arena.hpp"
#include "host/copy_engine.hpp"
#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"

namespace py = pybind11;
namespace dk = deepep::kernels;
using deepep::layout::ControlLayout;
using deepep::layout::StagingLayout;
using deepep::host::Arena;
using deepep::host::arenas;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// The device of a Domain is the current one inside, whatever the caller's is.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : wanted_(device) {
    dk::check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != wanted_) dk::check(cudaSetDevice(wanted_), "cudaSetDevice");
  }
  ~DeviceScope() {
    if (before_ != wanted_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int wanted_;
  int before_ = 0;
};

class Event {
 public:
  Event() { dk::check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { dk::check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void hold_back(cudaStream_t stream) { dk::check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  void wait() { dk::check(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_{};
};

/// One rank's operations run one after the other, on whatever streams they are launched: its kernels count their calls
/// in one place. What is captured into a graph is ordered by whoever launches the graph.
class Turns {
 public:
  template <class Launch>
  void take(cudaStream_t stream, const Launch& launch) {
    cudaStreamCaptureStatus capturing{};
    dk::check(cudaStreamIsCapturing(stream, &capturing), "cudaStreamIsCapturing");
    if (capturing != cudaStreamCaptureStatusNone) return launch();
    unsigned long long id = 0;
    dk::check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    if (any_ && id != last_) ended_.hold_back(stream);
    launch();
    ended_.record(stream);
    last_ = id;
    any_ = true;
  }
  /// Blocks the host until the last operation has ended.
  void wait() { ended_.wait(); }

 private:
  Event ended_;
  unsigned long long last_ = 0;
  bool any_ = false;
};

/// What all cached dispatches along one handle with rows of one kind pass alike.
struct CachedDispatch {
  int num_blocks;
  dk::DispatchArgs args;
};

/// The counts of a handle [R, R], where the host knows them.
struct RowCounts {
  std::vector<int32_t> counts;
};

/// One rank's view of its NVLink domain, and the operations on it. All pointers are the caller's to keep alive.
class Domain {
 public:
  Domain(int rank, const std::vector<uintptr_t>& heaps, int max_local_experts, int max_blocks, int64_t staging_bytes,
         uintptr_t state, uintptr_t fault, double timeout_seconds) {
    if (heaps.empty() || heaps.size() > deepep::layout::kMaxRanks)
      throw std::invalid_argument("an NVLink domain has 1 to 32 ranks");
    group_.rank = rank;
    group_.num_ranks = static_cast<int>(heaps.size());
    group_.live = heaps.size() == 32 ? 0xffffffffu : (1u << heaps.size()) - 1u;
    group_.timeout_ns = static_cast<uint64_t>(timeout_seconds * 1e9);
    group_.control = ControlLayout{group_.num_ranks, max_local_experts, max_blocks};
    group_.staging_offset = group_.control.bytes();
    staging_bytes_ = staging_bytes;
    for (size_t r = 0; r < heaps.size(); ++r) group_.heap[r] = pointer<std::byte>(heaps[r]);
    group_.state = pointer<dk::LocalState>(state);
    group_.fault = pointer<dk::FaultRecord>(fault);
    dk::check(cudaGetDevice(&device_), "cudaGetDevice");
    dk::load_dispatch();
    dk::load_combine();
  }

  void set_live(uint32_t live) { group_.live = live; }
  void set_timeout(double seconds) { group_.timeout_ns = static_cast<uint64_t>(seconds * 1e9); }

  void dispatch(int num_blocks, int push_blocks, int local_blocks, bool refused, int64_t num_tokens, int num_topk,
                int num_local_experts, int num_scales, int index_bytes, int64_t row_bytes, uintptr_t x,
                uintptr_t scales, int64_t scale_token_stride, int64_t scale_stride, uintptr_t topk_idx,
                uintptr_t topk_weights, uintptr_t is_token_in_rank, uintptr_t tokens_per_rank,
                uintptr_t tokens_per_expert, uintptr_t counts, uintptr_t send_row, uintptr_t slot_x,
                uintptr_t slot_source, uintptr_t slot_scales, uintptr_t slot_topk_idx, uintptr_t slot_topk_weights,
                int64_t slot_capacity, int64_t num_worst_tokens, uintptr_t host, uint32_t ticket, uintptr_t stream) {
    check_roles(num_blocks, push_blocks, local_blocks);
    const dk::DispatchArgs args{group_,
                                refused ? dk::DispatchMode::kRefused : dk::DispatchMode::kFresh,
                                push_blocks,
                                local_blocks,
                                num_tokens,
                                num_topk,
                                num_local_experts,
                                num_scales,
                                index_bytes,
                                row_bytes,
                                pointer<const std::byte>(x),
                                pointer<const uint32_t>(scales),
                                scale_token_stride,
                                scale_stride,
                                pointer<const void>(topk_idx),
                                pointer<const uint32_t>(topk_weights),
                                pointer<const uint8_t>(is_token_in_rank),
                                pointer<const int32_t>(tokens_per_rank),
                                pointer<const int32_t>(tokens_per_expert),
                                pointer<int32_t>(counts),
                                pointer<int32_t>(send_row),
                                {offset(slot_x), offset(slot_source), offset(slot_scales), offset(slot_topk_idx),
                                 offset(slot_topk_weights)},
                                slot_capacity,
                                num_worst_tokens,
                                pointer<dk::HostCounts>(host),
                                ticket};
    in_turn(stream, [&] { dk::launch_dispatch(args, num_blocks, pointer<void>(stream)); });
  }

  /// Nothing but addresses is new: this is the call whose host time counts most.
  void dispatch_cached(const CachedDispatch& call, uintptr_t x, uintptr_t scales, uintptr_t slot_x, uintptr_t slot_scales,
                       uintptr_t stream) {
    dk::DispatchArgs args = call.args;
    args.group = group_;
    args.x = pointer<const std::byte>(x);
    args.scales = pointer<const uint32_t>(scales);
    args.slot[deepep::layout::kSlotRows] = offset(slot_x);
    args.slot[deepep::layout::kSlotScales] = offset(slot_scales);
    in_turn(stream, [&] { dk::launch_dispatch(args, call.num_blocks, pointer<void>(stream)); });
  }

  void combine(int num_blocks, int push_blocks, int reduce_blocks, bool refused, int64_t num_tokens, int num_topk, int64_t row_bytes,
               uintptr_t x, uintptr_t topk_weights, uintptr_t bias_0, uintptr_t bias_1, uintptr_t counts,
               uintptr_t send_row, uintptr_t out, uintptr_t out_weights, const RowCounts* known, int engine_chunks,
               int engine_shrink, uintptr_t stream) {
    // All blocks may sum, whichever push.
    if (reduce_blocks != num_blocks) check_roles(num_blocks, push_blocks, reduce_blocks);
    dk::CombineArgs args{group_,
                               refused ? dk::CombineMode::kRefused
                                       : dk::combine_mode(num_blocks, push_blocks, reduce_blocks),
                               push_blocks,
                               num_tokens,
                               num_topk,
                               row_bytes,
                               StagingLayout{staging_bytes_, row_bytes, num_topk},
                               pointer<const std::byte>(x),
                               pointer<const float>(topk_weights),
                               {pointer<const std::byte>(bias_0), pointer<const std::byte>(bias_1)},
                               pointer<const int32_t>(counts),
                               pointer<const int32_t>(send_row),
                               pointer<std::byte>(out),
                               pointer<float>(out_weights),
                               {}};
    // A graph would replay the kernel without its orders; a launch that returns only when the kernel has ended would
    // never let them be given.
    const bool carries = engine_chunks > 0 && known != nullptr && !launches_block_ && !is_capturing(stream) &&
                         dk::CopyEngine::has_room(args, known->counts.data());
    in_turn(stream, [&] {
      if (!carries) return dk::launch_combine(args, num_blocks, pointer<void>(stream));
      if (!engine_) engine_ = std::make_unique<dk::CopyEngine>();
      args.mode = dk::CombineMode::kCopyEngine;
      args.copy_engine = engine_->take({engine_chunks, engine_shrink});
      dk::launch_combine(args, num_blocks, pointer<void>(stream));
      engine_->order(args, known->counts.data());
    });
  }

  /// Does not cross ranks; its workspace is one for all.
  void layout(int num_ranks, int num_experts, int ranks_per_node, int num_topk, int index_bytes, int64_t num_tokens,
              uintptr_t topk_idx, uintptr_t tokens_per_rank, uintptr_t tokens_per_node, uintptr_t tokens_per_expert,
              uintptr_t is_token_in_rank, uintptr_t workspace, int num_blocks, uintptr_t stream) {
    const dk::LayoutArgs args{num_ranks,
                              num_experts,
                              ranks_per_node,
                              num_topk,
                              index_bytes,
                              num_tokens,
                              pointer<const void>(topk_idx),
                              pointer<int32_t>(tokens_per_rank),
                              pointer<int32_t>(tokens_per_node),
                              pointer<int32_t>(tokens_per_expert),
                              pointer<uint8_t>(is_token_in_rank),
                              pointer<uint32_t>(workspace)};
    in_turn(stream, [&] { dk::launch_layout(args, num_blocks, pointer<void>(stream)); });
  }

  void barrier(uintptr_t stream) {
    in_turn(stream, [&] { dk::launch_barrier(group_, pointer<void>(stream)); });
  }

  /// What `stream` gets from now on runs after what `before` holds now.
  void follow(uintptr_t before, uintptr_t stream) {
    const DeviceScope scope(device_);
    fork_.record(pointer<CUstream_st>(before));
    fork_.hold_back(pointer<CUstream_st>(stream));
  }

  /// Blocks the host, without the GIL, until the last operation has ended.
  void wait() {
    const py::gil_scoped_release release;
    const DeviceScope scope(device_);
    turns_.wait();
  }

  [[nodiscard]] bool has_fault() const { return __atomic_load_n(&group_.fault->pending, __ATOMIC_ACQUIRE) != 0; }

  /// (operation, phase, missing ranks as bits, expected, seen) of the fault that was recorded since the last call, or
  /// None. Its notes on the device are cleared behind the operations launched so far, on `stream`.
  py::object take_fault(uintptr_t stream) {
    if (!has_fault()) return py::none();
    dk::FaultRecord* record = group_.fault;
    py::tuple fault = py::make_tuple(record->operation, record->phase, record->missing, record->expected, record->seen);
    __atomic_store_n(&record->pending, 0u, __ATOMIC_RELEASE);
    in_turn(stream, [&] {
      dk::check(cudaMemsetAsync(&group_.state->phase, 0, sizeof(dk::LocalState) - offsetof(dk::LocalState, phase),
                                pointer<CUstream_st>(stream)),
                "cudaMemsetAsync");
    });
    return fault;
  }

  /// Blocks of the two kinds are disjoint and make up the grid, or all blocks are of both.
  static void check_roles(int blocks, int one, int other) {
    if (blocks < 1 || (one + other != blocks && (one != blocks || other != blocks)))
      throw std::invalid_argument("blocks of two kinds must be disjoint, or all of both");
  }

 private:
  /// Where in this rank's heap; 0 for nowhere.
  [[nodiscard]] int64_t offset(uintptr_t address) const {
    return address == 0 ? 0 : pointer<std::byte>(address) - group_.heap[group_.rank];
  }

  [[nodiscard]] static bool is_capturing(uintptr_t stream) {
    cudaStreamCaptureStatus status{};
    dk::check(cudaStreamIsCapturing(pointer<CUstream_st>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  [[nodiscard]] static bool has_blocking_launches() {
    const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
    return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
  }

  template <class Launch>
  void in_turn(uintptr_t stream, const Launch& launch) {
    const DeviceScope scope(device_);
    turns_.take(pointer<CUstream_st>(stream), launch);
  }

  dk::Group group_{};
  int64_t staging_bytes_ = 0;
  int device_ = 0;
  Turns turns_;
  Event fork_;
  std::unique_ptr<dk::CopyEngine> engine_;  // once a combine leaves rows to it
  bool launches_block_ = has_blocking_launches();
};

CachedDispatch cached_dispatch(int num_blocks, int push_blocks, int local_blocks, int64_t num_tokens, int num_scales,
                               int64_t row_bytes, int64_t scale_token_stride, int64_t scale_stride, uintptr_t counts,
                               uintptr_t send_row, int64_t slot_capacity) {
  Domain::check_roles(num_blocks, push_blocks, local_blocks);
  CachedDispatch call{num_blocks, {}};
  call.args.push_blocks = push_blocks;
  call.args.local_blocks = local_blocks;
  call.args.mode = dk::DispatchMode::kCached;
  call.args.num_tokens = num_tokens;
  call.args.num_scales = num_scales;
  call.args.index_bytes = 8;
  call.args.row_bytes = row_bytes;
  call.args.scale_token_stride = scale_token_stride;
  call.args.scale_stride = scale_stride;
  call.args.counts = pointer<int32_t>(counts);
  call.args.send_row = pointer<int32_t>(send_row);
  call.args.slot_capacity = slot_capacity;
  return call;
}

/// Waits, without the GIL, until a dispatch has written all its words with `ticket`.
/// (phase, rows for this rank, the most rows of any rank, rows that combine brings back, the counts, top-k entries per
/// local expert), or None at the deadline.
py::object wait_counts(uintptr_t address, uint32_t ticket, int num_ranks, int num_local_experts,
                       double timeout_seconds) {
  const auto* words = pointer<uint64_t>(address);
  const int table = static_cast<int>(offsetof(dk::HostCounts, lists) / sizeof(uint64_t));
  const int experts = table + num_ranks * num_ranks;
  std::vector<uint32_t> values(static_cast<size_t>(experts + num_local_experts));
  bool arrived = true;
  {
    py::gil_scoped_release release;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds);
    for (size_t i = 0; i < values.size() && arrived; ++i) {
      uint64_t word = 0;
      while (static_cast<uint32_t>((word = __atomic_load_n(words + i, __ATOMIC_ACQUIRE)) >> 32) != ticket && arrived)
        arrived = std::chrono::steady_clock::now() < end;
      values[i] = static_cast<uint32_t>(word);
    }
  }
  if (!arrived) return py::none();
  return py::make_tuple(values[0], values[1], values[2], values[3],
                        RowCounts{{values.begin() + table, values.begin() + experts}},
                        std::vector<uint32_t>(values.begin() + experts, values.end()));
}

/// Whether a stream has done all it holds. One that is being captured has not; asking disturbs no thread's capture.
bool stream_is_idle(uintptr_t address) {
  auto mode = cudaStreamCaptureModeRelaxed;
  dk::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  const auto stream = pointer<CUstream_st>(address);
  cudaStreamCaptureStatus capturing{};
  cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  const bool may_ask = status == cudaSuccess && capturing == cudaStreamCaptureStatusNone;
  if (may_ask) status = cudaStreamQuery(stream);
  dk::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  if (status == cudaErrorNotReady || status == cudaErrorStreamCaptureImplicit)
    (void)cudaGetLastError();
  else
    dk::check(status, "cudaStreamQuery");
  return may_ask && status == cudaSuccess;
}

}  // namespace

/// What torch's CUDAPluggableAllocator calls, by name.
extern "C" __attribute__((visibility("default"))) void* deepep_arena_take(size_t bytes, int, void*) {
  return arenas().take(static_cast<int64_t>(bytes));
}
extern "C" __attribute__((visibility("default"))) void deepep_arena_give_back(void* block, size_t bytes, int, void*) {
  arenas().give_back(block, static_cast<int64_t>(bytes));
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of deepep, for sm_90.";
  m.attr("STATE_BYTES") = sizeof(dk::LocalState);
  m.attr("FAULT_BYTES") = sizeof(dk::FaultRecord);
  m.attr("MAX_RANKS") = deepep::layout::kMaxRanks;

  m.attr("ENGINE_DONE") = offsetof(dk::LocalState, ce_completed) / sizeof(uint32_t);  // a word of the state

  py::class_<CachedDispatch>(m, "CachedDispatch").def(py::init(&cached_dispatch));
  py::class_<RowCounts>(m, "RowCounts").def(py::init([](std::vector<int32_t> counts) {
    return RowCounts{std::move(counts)};
  }));
  py::class_<Domain>(m, "Domain")
      .def(py::init<int, const std::vector<uintptr_t>&, int, int, int64_t, uintptr_t, uintptr_t, double>())
      .def("set_live", &Domain::set_live)
      .def("set_timeout", &Domain::set_timeout)
      .def("dispatch", &Domain::dispatch)
      .def("dispatch_cached", &Domain::dispatch_cached)
      .def("combine", &Domain::combine)
      .def("layout", &Domain::layout)
      .def("barrier", &Domain::barrier)
      .def("follow", &Domain::follow)
      .def("wait", &Domain::wait)
      .def("has_fault", &Domain::has_fault)
      .def("take_fault", &Domain::take_fault);

  m.def(
      "copy",
      [](uintptr_t from, uintptr_t to, int64_t bytes, int num_blocks, uintptr_t stream, bool bulk, int warps, int stages,
         int64_t stage_bytes) {
        if (bulk)
          dk::launch_bulk_copy(pointer<const std::byte>(from), pointer<std::byte>(to), bytes, warps, stages, stage_bytes,
                               num_blocks, pointer<void>(stream));
        else
          dk::launch_copy(pointer<const std::byte>(from), pointer<std::byte>(to), bytes, num_blocks,
                          pointer<void>(stream));
      },
      py::arg("source"), py::arg("target"), py::arg("num_bytes"), py::arg("num_blocks"), py::arg("stream"), py::kw_only(),
      py::arg("bulk") = false, py::arg("warps") = 4, py::arg("stages") = 6, py::arg("stage_bytes") = 8192);
  m.def("arena_open", [](uintptr_t base, int64_t bytes) {
    return arenas().open(pointer<std::byte>(base), bytes);
  });
  m.def("arena_reserve", [](int64_t id, int64_t bytes) {
    arenas().select(id);
    void* block = arenas().take(bytes);
    arenas().select(0);
    return reinterpret_cast<uintptr_t>(block);
  });
  m.def("arena_set_aside", [](int64_t id, int64_t bytes) {
    return arenas().of(id, [&](Arena& arena) { return reinterpret_cast<uintptr_t>(arena.set_aside(bytes)); });
  });
  m.def("arena_came_back", [](int64_t id) { return arenas().of(id, [](Arena& arena) { return arena.came_back(); }); });
  m.def("arena_settle", [](int64_t id, int64_t count) { arenas().of(id, [&](Arena& arena) { arena.settle(count); }); });
  m.def("arena_used", [](int64_t id) { return arenas().of(id, [](Arena& arena) { return arena.used(); }); });
  m.def("arena_close", [](int64_t id) { arenas().close(id); });
  m.def("arena_select", [](int64_t id) { arenas().select(id); });
  m.def("stream_is_idle", &stream_is_idle);
  m.def("wait_counts", &wait_counts);
  m.def("host_counts_bytes", [](int num_ranks, int num_local_experts) {
    return offsetof(dk::HostCounts, lists) + sizeof(uint64_t) * (num_ranks * num_ranks + num_local_experts);
  });
  m.def("control_bytes", [](int num_ranks, int max_local_experts, int max_blocks) {
    return ControlLayout{num_ranks, max_local_experts, max_blocks}.bytes();
  });
  m.def("staging_capacity", [](int64_t area_bytes, int64_t row_bytes, int num_topk) {
    return StagingLayout{area_bytes, row_bytes, num_topk}.capacity();
  });
}
