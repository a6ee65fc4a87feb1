// deepep._core: the layout rules of csrc/core for Python, over numpy views (torch CPU tensors lend theirs
// without a copy). Shapes are checked here, once; results go into arrays the caller allocated; the GIL is
// released meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/capacity.hpp"
#include "core/counts.hpp"
#include "core/low_latency_buffer.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace deepep::core;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

void expect(bool holds, const std::string& what) {
  if (!holds) refuse(what);
}

/// Contiguous array of exactly this shape (-1: any length).
template <class T>
void expect_shape(const Array<T>& array, std::initializer_list<int64_t> shape, const char* name) {
  bool same = array.ndim() == py::ssize_t(shape.size());
  std::string wanted, got;
  for (size_t i = 0; same && i < shape.size(); ++i) {
    const int64_t length = shape.begin()[i];
    same = length < 0 || array.shape(py::ssize_t(i)) == length;
  }
  if (same) return;
  for (const int64_t length : shape) wanted += (length < 0 ? "any" : std::to_string(length)) + ", ";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) got += std::to_string(array.shape(i)) + ", ";
  refuse(std::string(name) + ": shape [" + got.substr(0, got.size() - (got.empty() ? 0 : 2)) +
         "]; expected [" + wanted.substr(0, wanted.size() - 2) + "]");
}

Placement placement(int64_t num_experts, int64_t num_ranks, int64_t ranks_per_node) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  expect(num_ranks > 0 && num_ranks <= limit,
         "num_ranks: got " + std::to_string(num_ranks) + "; expected 1 or more");
  expect(ranks_per_node > 0 && ranks_per_node <= limit,
         "ranks_per_node: got " + std::to_string(ranks_per_node) + "; expected 1 or more");
  expect(num_experts > 0 && num_experts <= limit && num_experts % num_ranks == 0,
         "num_experts: got " + std::to_string(num_experts) +
             "; expected a multiple of num_ranks = " + std::to_string(num_ranks));
  return Placement(int32_t(num_experts), int32_t(num_ranks), int32_t(ranks_per_node));
}

/// Entries are -1 or an expert; anything else is named with its place.
template <class Index>
void expect_experts(const Array<Index>& topk_idx, int64_t num_experts) {
  const Index* entries = topk_idx.data();
  const int64_t count = topk_idx.size();
  for (int64_t i = 0; i < count; ++i) {
    if (entries[i] >= -1 && entries[i] < num_experts) continue;
    const int64_t num_topk = topk_idx.shape(1);
    refuse("topk_idx: got " + std::to_string(entries[i]) + " at [" + std::to_string(i / num_topk) + ", " +
           std::to_string(i % num_topk) + "]; expected -1 or 0 .. " + std::to_string(num_experts - 1));
  }
}

/// A size as Python's int, or OverflowError: sizes are used as 64-bit offsets.
int64_t as_size(wide_t bytes, const char* what) {
  if (!fits_int64(bytes)) {
    throw std::overflow_error(std::string(what) + ": the size does not fit into 64 bits");
  }
  return int64_t(bytes);
}

template <class... Sizes>
void expect_not_negative(const char* what, Sizes... sizes) {
  expect(((sizes >= 0) && ...), std::string(what) + ": sizes must not be negative");
}

// ---- what a rank sends

template <class Index>
void dispatch_layout(const Array<Index>& topk_idx, int64_t num_experts, int64_t num_ranks,
                     int64_t ranks_per_node, Array<int32_t> per_rank, Array<int32_t> per_node,
                     Array<int32_t> per_expert, Array<bool> is_token_in_rank) {
  const Placement place = placement(num_experts, num_ranks, ranks_per_node);
  expect_shape(topk_idx, {-1, -1}, "topk_idx");
  const int64_t num_tokens = topk_idx.shape(0);
  expect_shape(per_rank, {num_ranks}, "num_tokens_per_rank");
  expect_shape(per_node, {place.num_nodes()}, "num_tokens_per_node");
  expect_shape(per_expert, {num_experts}, "num_tokens_per_expert");
  expect_shape(is_token_in_rank, {num_tokens, num_ranks}, "is_token_in_rank");
  const TopkCounts counts{per_rank.mutable_data(), per_node.mutable_data(), per_expert.mutable_data(),
                          reinterpret_cast<uint8_t*>(is_token_in_rank.mutable_data())};
  const py::gil_scoped_release unlocked;
  expect_experts(topk_idx, num_experts);
  std::fill_n(counts.per_rank, num_ranks, 0);
  std::fill_n(counts.per_node, place.num_nodes(), 0);
  std::fill_n(counts.per_expert, num_experts, 0);
  count_topk(topk_idx.data(), int(topk_idx.shape(1)), 0, num_tokens, place, counts);
}

// ---- sizes

int64_t queue_nvl_bytes(int64_t num_channels, int64_t recv_tokens, int64_t hidden_bytes, int64_t num_ranks) {
  expect_not_negative("nvl_buffer_size", num_channels, recv_tokens, hidden_bytes, num_ranks);
  return as_size(QueueSizes{num_channels, recv_tokens, 0}.nvl_bytes(hidden_bytes, num_ranks),
                 "nvl_buffer_size");
}

int64_t queue_rdma_bytes(int64_t num_channels, int64_t recv_tokens, int64_t hidden_bytes, int64_t num_ranks) {
  expect_not_negative("rdma_buffer_size", num_channels, recv_tokens, hidden_bytes, num_ranks);
  return as_size(QueueSizes{num_channels, 0, recv_tokens}.rdma_bytes(hidden_bytes, num_ranks),
                 "rdma_buffer_size");
}

int64_t low_latency_bytes(int64_t num_max_tokens, int64_t hidden, int64_t num_ranks, int64_t num_topk) {
  expect_not_negative("low_latency_buffer_size", num_max_tokens, hidden, num_ranks, num_topk);
  return as_size(LowLatencyBuffer<wide_t>{num_ranks, num_max_tokens, hidden, num_topk}.total_bytes(),
                 "low_latency_buffer_size");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Layout rules shared by the kernels, the emulator and the host. deepep.layout is the typed face.";
  m.attr("MAX_TOPK") = kMaxTopk;

  const auto bind_for = [&m]<class Index>(Index) {
    m.def("dispatch_layout", &dispatch_layout<Index>, "topk_idx"_a.noconvert(), "num_experts"_a,
          "num_ranks"_a, "ranks_per_node"_a, "num_tokens_per_rank"_a.noconvert(),
          "num_tokens_per_node"_a.noconvert(), "num_tokens_per_expert"_a.noconvert(),
          "is_token_in_rank"_a.noconvert());
  };
  bind_for(int32_t{});
  bind_for(int64_t{});

  m.def("queue_nvl_bytes", &queue_nvl_bytes, "num_channels"_a, "recv_tokens"_a, "hidden_bytes"_a,
        "num_ranks"_a);
  m.def("queue_rdma_bytes", &queue_rdma_bytes, "num_channels"_a, "recv_tokens"_a, "hidden_bytes"_a,
        "num_ranks"_a);
  m.def("low_latency_bytes", &low_latency_bytes, "num_max_tokens"_a, "hidden"_a, "num_ranks"_a, "num_topk"_a);
}
