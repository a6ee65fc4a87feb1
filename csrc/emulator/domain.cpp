#include "emulator/domain.hpp"

#include <pybind11/stl.h>

#include "emulator/copy_engine.hpp"
#include "emulator/run/simulation.hpp"
#include "kernels/barrier/barrier.hpp"
#include "kernels/combine/call.hpp"
#include "kernels/dispatch/metadata.hpp"

namespace py = pybind11;
namespace dk = deepep::kernels;

namespace deepep::emu {

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// One rank's view of its NVLink domain, as deepep._cuda.Domain, on an emulated machine. Launches go to the rank's
/// stream, or to its copy engine's. `num_threads`: per block, for all kernels; fewer than on hardware, so that
/// schedules are cheap.
class Domain {
 public:
  Domain(Simulation& machine, const KernelSet& kernels, int num_threads, int rank, const std::vector<uintptr_t>& heaps,
         int max_local_experts, int max_blocks, int64_t staging_bytes, uintptr_t state, uintptr_t fault,
         double timeout_seconds)
      : machine_(machine), kernels_(kernels), num_threads_(num_threads) {
    if (heaps.empty() || heaps.size() > layout::kMaxRanks)
      throw std::invalid_argument("an NVLink domain has 1 to 32 ranks");
    if (num_threads < 64) throw std::invalid_argument("a block of a combine has two warps or more");
    group_.rank = rank;
    group_.num_ranks = static_cast<int>(heaps.size());
    group_.live = heaps.size() == 32 ? 0xffffffffu : (1u << heaps.size()) - 1u;
    group_.timeout_ns = static_cast<uint64_t>(timeout_seconds * 1e9);
    group_.control = layout::ControlLayout{group_.num_ranks, max_local_experts, max_blocks};
    group_.staging_offset = group_.control.bytes();
    staging_bytes_ = staging_bytes;
    for (size_t r = 0; r < heaps.size(); ++r) group_.heap[r] = pointer<std::byte>(heaps[r]);
    group_.state = pointer<dk::LocalState>(state);
    group_.fault = pointer<dk::FaultRecord>(fault);
  }

  void set_live(uint32_t live) { group_.live = live; }
  void set_timeout(double seconds) { group_.timeout_ns = static_cast<uint64_t>(seconds * 1e9); }

  void dispatch(int num_blocks, int push_blocks, int local_blocks, bool refused, bool cached, int64_t num_tokens, int num_topk,
                int num_local_experts, int num_scales, int index_bytes, int64_t row_bytes, uintptr_t x,
                uintptr_t scales, int64_t scale_token_stride, int64_t scale_stride, uintptr_t topk_idx,
                uintptr_t topk_weights, uintptr_t is_token_in_rank, uintptr_t tokens_per_rank,
                uintptr_t tokens_per_expert, uintptr_t counts, uintptr_t send_row, int64_t slot_offset,
                int64_t slot_capacity, int64_t num_worst_tokens, uintptr_t host, uint32_t ticket) {
    dk::DispatchArgs args{};
    args.group = group_;
    args.mode = refused  ? dk::DispatchMode::kRefused
                : cached ? dk::DispatchMode::kCached
                         : dk::DispatchMode::kFresh;
    if (refused) num_blocks = push_blocks = local_blocks = 1;
    args.push_blocks = push_blocks;
    args.local_blocks = local_blocks;
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.num_local_experts = num_local_experts;
    args.num_scales = num_scales;
    args.index_bytes = index_bytes;
    args.row_bytes = row_bytes;
    args.x = pointer<const std::byte>(x);
    args.scales = pointer<const uint32_t>(scales);
    args.scale_token_stride = scale_token_stride;
    args.scale_stride = scale_stride;
    args.topk_idx = pointer<const void>(topk_idx);
    args.topk_weights = pointer<const uint32_t>(topk_weights);
    args.is_token_in_rank = pointer<const uint8_t>(is_token_in_rank);
    args.tokens_per_rank = pointer<const int32_t>(tokens_per_rank);
    args.tokens_per_expert = pointer<const int32_t>(tokens_per_expert);
    args.counts = pointer<int32_t>(counts);
    args.send_row = pointer<int32_t>(send_row);
    const layout::SlotLayout slot{slot_capacity, row_bytes, num_scales, num_topk, index_bytes};
    args.slot[layout::kSlotRows] = slot_offset;
    args.slot[layout::kSlotSource] = cached ? 0 : slot_offset + slot.source();  // a handle has it already
    args.slot[layout::kSlotScales] = slot_offset + slot.scales();
    args.slot[layout::kSlotIndices] = slot_offset + slot.topk_idx();
    args.slot[layout::kSlotWeights] = slot_offset + slot.topk_weights();
    args.slot_capacity = slot_capacity;
    args.num_worst_tokens = num_worst_tokens;
    args.host = pointer<dk::HostCounts>(host);
    args.ticket = ticket;
    dk::prepare(args);
    launch(refused  ? "dispatch_refused_kernel"
           : cached ? "dispatch_cached_kernel"
                    : "dispatch_kernel",
           args, num_blocks,
           dk::DispatchShared{group_.num_ranks, num_threads_ / 32}.bytes());
  }

  void combine(int num_blocks, int push_blocks, int reduce_blocks, bool refused, int64_t num_tokens, int num_topk,
               int64_t row_bytes, uintptr_t x, uintptr_t topk_weights, uintptr_t bias_0, uintptr_t bias_1, uintptr_t counts,
               uintptr_t send_row, uintptr_t out, uintptr_t out_weights, int engine_chunks, int engine_shrink) {
    dk::CombineArgs args{};
    args.group = group_;
    args.mode = refused             ? dk::CombineMode::kRefused
                : engine_chunks > 0 ? dk::CombineMode::kCopyEngine
                                    : dk::combine_mode(num_blocks, push_blocks, reduce_blocks);
    args.push_blocks = push_blocks;
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.row_bytes = row_bytes;
    args.staging = {staging_bytes_, row_bytes, num_topk};
    args.x = pointer<const std::byte>(x);
    args.topk_weights = pointer<const float>(topk_weights);
    args.bias[0] = pointer<const std::byte>(bias_0);
    args.bias[1] = pointer<const std::byte>(bias_1);
    args.counts = pointer<const int32_t>(counts);
    args.send_row = pointer<const int32_t>(send_row);
    args.out = pointer<std::byte>(out);
    args.out_weights = pointer<float>(out_weights);
    const int64_t shared = dk::CombineShared{group_.num_ranks}.bytes();
    if (refused) return launch("combine_refused_kernel", args, 1, shared);
    if (engine_chunks == 0) return launch("combine_kernel", args, num_blocks, shared);
    engine_ticket_ += static_cast<uint32_t>(engine_chunks);
    args.copy_engine = {{engine_chunks, engine_shrink}, engine_ticket_};
    launch("combine_copy_engine_kernel", args, num_blocks, shared);
    const CopyEngineArgs orders{args, 100 * group_.timeout_ns};
    machine_.launch(group_.num_ranks + group_.rank, kernels_, "copy_engine_kernel", &orders, sizeof(orders), 1, 32, 0);
  }

  /// Where the host watches for a fault: the word becomes 1 when there is one.
  uintptr_t fault_word() const { return reinterpret_cast<uintptr_t>(&group_.fault->pending); }

  /// (operation, phase, missing ranks as bits, expected, seen), or None. `watched`: while a kernel runs; the record then
  /// stays. Otherwise it is taken: the stream must be idle.
  py::object take_fault(bool watched) {
    dk::FaultRecord record;
    const auto address = reinterpret_cast<uintptr_t>(group_.fault);
    if (watched)
      machine_.watcher_read(group_.rank, address, &record, sizeof(record));
    else
      machine_.host_read(group_.rank, address, &record, sizeof(record));
    if (record.pending == 0) return py::none();
    if (!watched) {
      record.pending = 0;
      machine_.host_write(group_.rank, fault_word(), &record.pending, sizeof(record.pending));
      const std::vector<std::byte> zeros(sizeof(dk::LocalState) - offsetof(dk::LocalState, phase));
      machine_.host_write(group_.rank, reinterpret_cast<uintptr_t>(&group_.state->phase), zeros.data(), zeros.size());
    }
    return py::make_tuple(record.operation, record.phase, record.missing, record.expected, record.seen);
  }

  /// Whether the copy engine was let go with all that it was ordered. The stream must be idle.
  bool engine_was_let_go() {
    uint32_t go = 0;
    machine_.host_read(group_.rank, reinterpret_cast<uintptr_t>(&group_.state->ce_doorbell), &go, sizeof(go));
    return static_cast<int32_t>(go - engine_ticket_) >= 0;
  }

  void barrier() { launch("barrier_kernel", dk::BarrierArgs{group_}, 1, 16); }

  void layout(int num_experts, int ranks_per_node, int num_topk, int index_bytes, int64_t num_tokens,
              uintptr_t topk_idx, uintptr_t tokens_per_rank, uintptr_t tokens_per_node, uintptr_t tokens_per_expert,
              uintptr_t is_token_in_rank, uintptr_t workspace, int num_blocks, int num_threads) {
    dk::LayoutArgs args{};
    args.num_ranks = group_.num_ranks;
    args.num_experts = num_experts;
    args.ranks_per_domain = ranks_per_node;
    args.num_topk = num_topk;
    args.index_bytes = index_bytes;
    args.num_tokens = num_tokens;
    args.topk_idx = pointer<const void>(topk_idx);
    args.tokens_per_rank = pointer<int32_t>(tokens_per_rank);
    args.tokens_per_domain = pointer<int32_t>(tokens_per_node);
    args.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
    args.is_token_in_rank = pointer<uint8_t>(is_token_in_rank);
    args.workspace = pointer<uint32_t>(workspace);
    const int64_t nodes = layout::ceil_div(group_.num_ranks, ranks_per_node);
    launch("layout_kernel", args, num_blocks, 4 * (num_experts + group_.num_ranks + nodes + 4), num_threads);
  }

 private:
  template <class Args>
  void launch(const char* kernel, const Args& args, int num_blocks, int64_t shared_bytes, int num_threads = 0) {
    machine_.launch(group_.rank, kernels_, kernel, &args, sizeof(args), num_blocks,
                    num_threads == 0 ? num_threads_ : num_threads, shared_bytes);
  }

  Simulation& machine_;
  const KernelSet& kernels_;
  int num_threads_;
  dk::Group group_{};
  int64_t staging_bytes_ = 0;
  uint32_t engine_ticket_ = 0;
};

}  // namespace

void bind_domain(py::module_& m) {
  m.attr("STATE_BYTES") = sizeof(dk::LocalState);
  m.attr("FAULT_BYTES") = sizeof(dk::FaultRecord);
  m.attr("EPOCHS") = offsetof(dk::LocalState, blocks_started) / sizeof(uint32_t);  // the first words of the state
  m.attr("MAX_RANKS") = layout::kMaxRanks;
  m.attr("TOO_MANY_ROWS") = static_cast<uint32_t>(dk::Phase::kTooManyRows);
  m.attr("DISAGREEMENT") = static_cast<uint32_t>(dk::Phase::kDisagreement);
  m.attr("HOST_COUNTS_WORDS") = offsetof(dk::HostCounts, lists) / sizeof(uint64_t);
  py::class_<Domain>(m, "Domain")
      .def(py::init([](Simulation& machine, const Kernels& kernels, int num_threads, int rank,
                       const std::vector<uintptr_t>& heaps, int max_local_experts, int max_blocks,
                       int64_t staging_bytes, uintptr_t state, uintptr_t fault, double timeout_seconds) {
             return Domain(machine, *kernels.set, num_threads, rank, heaps, max_local_experts, max_blocks,
                           staging_bytes, state, fault, timeout_seconds);
           }),
           py::keep_alive<1, 2>(), py::kw_only(), py::arg("machine"), py::arg("kernels"), py::arg("num_threads"),
           py::arg("rank"), py::arg("heaps"), py::arg("max_local_experts"), py::arg("max_blocks"),
           py::arg("staging_bytes"), py::arg("state"), py::arg("fault"), py::arg("timeout_seconds"))
      .def("set_live", &Domain::set_live)
      .def("set_timeout", &Domain::set_timeout)
      .def("dispatch", &Domain::dispatch, py::arg("num_blocks"), py::arg("push_blocks"), py::arg("local_blocks"),
           py::arg("refused"), py::arg("cached"), py::arg("num_tokens"), py::arg("num_topk"), py::arg("num_local_experts"),
           py::arg("num_scales"), py::arg("index_bytes"), py::arg("row_bytes"), py::arg("x"), py::arg("scales"),
           py::arg("scale_token_stride"), py::arg("scale_stride"), py::arg("topk_idx"), py::arg("topk_weights"),
           py::arg("is_token_in_rank"), py::arg("tokens_per_rank"), py::arg("tokens_per_expert"), py::arg("counts"),
           py::arg("send_row"), py::arg("slot_offset"), py::arg("slot_capacity"), py::arg("num_worst_tokens"),
           py::arg("host"), py::arg("ticket"))
      .def("combine", &Domain::combine, py::arg("num_blocks"), py::arg("push_blocks"), py::arg("reduce_blocks"),
           py::arg("refused"), py::arg("num_tokens"), py::arg("num_topk"), py::arg("row_bytes"), py::arg("x"), py::arg("topk_weights"),
           py::arg("bias_0"), py::arg("bias_1"), py::arg("counts"), py::arg("send_row"), py::arg("out"),
           py::arg("out_weights"), py::arg("engine_chunks"), py::arg("engine_shrink"))
      .def_property_readonly("fault_word", &Domain::fault_word)
      .def("take_fault", &Domain::take_fault, py::arg("watched"))
      .def("engine_was_let_go", &Domain::engine_was_let_go)
      .def("barrier", &Domain::barrier)
      .def("layout", &Domain::layout, py::arg("num_experts"), py::arg("ranks_per_node"), py::arg("num_topk"),
           py::arg("index_bytes"), py::arg("num_tokens"), py::arg("topk_idx"), py::arg("tokens_per_rank"),
           py::arg("tokens_per_node"), py::arg("tokens_per_expert"), py::arg("is_token_in_rank"),
           py::arg("workspace"), py::arg("num_blocks"), py::arg("num_threads"));
  m.def("host_counts_bytes", [](int num_ranks, int num_local_experts) {
    const auto words = static_cast<size_t>(num_ranks * num_ranks + num_local_experts);
    return offsetof(dk::HostCounts, lists) + sizeof(uint64_t) * words;
  });
  m.def("control_bytes", [](int num_ranks, int max_local_experts, int max_blocks) {
    return layout::ControlLayout{num_ranks, max_local_experts, max_blocks}.bytes();
  });
  m.def("counting_words", [](int num_ranks, int max_local_experts, int max_blocks) {  // those that only grow
    const layout::ControlLayout control{num_ranks, max_local_experts, max_blocks};
    std::vector<int64_t> offsets;
    for (int r = 0; r < num_ranks; ++r) offsets.insert(offsets.end(), {control.staging_free(r), control.arrived(r)});
    return offsets;
  });
  m.def("staging_capacity", [](int64_t area_bytes, int64_t row_bytes, int num_topk) {
    return layout::StagingLayout{area_bytes, row_bytes, num_topk}.capacity();
  });
  m.def("staging_rows_begin", [](int64_t area_bytes, int64_t row_bytes, int num_topk) {
    return layout::StagingLayout{area_bytes, row_bytes, num_topk}.rows_begin();
  });
  m.def("slot_offsets", [](int64_t capacity, int64_t row_bytes, int num_scales, int num_topk, int index_bytes) {
    const layout::SlotLayout slot{capacity, row_bytes, num_scales, num_topk, index_bytes};
    return py::make_tuple(slot.source(), slot.scales(), slot.topk_idx(), slot.topk_weights(), slot.bytes());
  });
}

}  // namespace deepep::emu
