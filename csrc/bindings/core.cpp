// deepep._core: the layout rules for Python, over numpy views (torch CPU tensors lend theirs without a copy).
// Shapes are checked here, values in csrc/layout/rules; results go into arrays the caller allocated; the GIL is
// released meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/crossing.hpp"
#include "bindings/tensor_set.hpp"
#include "layout/rules/gradients.hpp"
#include "layout/rules/layout.hpp"
#include "layout/rules/sizes.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
namespace host = deepep::host;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

/// Refuses any other shape; -1 stands for any length.
void expect_shape(const py::array& array, std::initializer_list<int64_t> shape, const char* name) {
  bool same = array.ndim() == py::ssize_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    const int64_t length = shape.begin()[i];
    same = length < 0 || array.shape(py::ssize_t(i)) == length;
  }
  if (same) return;
  std::string got, wanted;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) got += (i ? ", " : "") + std::to_string(array.shape(i));
  for (const int64_t length : shape) {
    wanted += (wanted.empty() ? "" : ", ") + (length < 0 ? std::string("any") : std::to_string(length));
  }
  throw py::value_error(std::string(name) + ": got shape [" + got + "]; expected [" + wanted + "]");
}

template <class T>
host::Matrix<const T> matrix(const Array<T>& array, const char* name) {
  expect_shape(array, {-1, -1}, name);
  return {array.data(), array.shape(0), array.shape(1)};
}

/// numpy's bool is a byte that holds 0 or 1.
host::Matrix<const uint8_t> table(const Array<bool>& array) {
  expect_shape(array, {-1, -1}, "is_token_in_rank");
  return {reinterpret_cast<const uint8_t*>(array.data()), array.shape(0), array.shape(1)};
}

/// Where results go: writable memory of exactly this shape.
template <class T>
T* result(Array<T>& array, std::initializer_list<int64_t> shape, const char* name) {
  expect_shape(array, shape, name);
  return array.mutable_data();
}

template <class Index>
void dispatch_layout(const Array<Index>& topk_idx, int64_t num_experts, int64_t num_ranks,
                     int64_t ranks_per_domain, Array<int32_t> per_rank, Array<int32_t> per_domain,
                     Array<int32_t> per_expert, Array<bool> is_token_in_rank) {
  const host::Group group{num_experts, num_ranks, ranks_per_domain};
  const auto topk = matrix(topk_idx, "topk_idx");
  int32_t* to_rank = result(per_rank, {num_ranks}, "num_tokens_per_rank");
  int32_t* to_domain = result(per_domain, {host::num_domains(group)}, "num_tokens_per_node");
  int32_t* to_expert = result(per_expert, {num_experts}, "num_tokens_per_expert");
  bool* in_rank = result(is_token_in_rank, {topk.rows, num_ranks}, "is_token_in_rank");
  const py::gil_scoped_release unlocked;
  host::dispatch_layout(topk, group, to_rank, to_domain, to_expert, reinterpret_cast<uint8_t*>(in_rank));
}

template <class Index>
void rank_masks(const Array<Index>& topk_idx, int64_t num_experts, int64_t num_ranks, Array<int64_t> masks) {
  const auto topk = matrix(topk_idx, "topk_idx");
  int64_t* out = result(masks, {topk.rows}, "masks");
  const py::gil_scoped_release unlocked;
  host::rank_masks(topk, {num_experts, num_ranks, num_ranks}, reinterpret_cast<uint64_t*>(out));
}

template <class Index>
void local_topk(const Array<Index>& topk_idx, int64_t num_experts, int64_t num_ranks, int64_t rank,
                Array<Index> local) {
  const auto topk = matrix(topk_idx, "topk_idx");
  Index* out = result(local, {topk.rows, topk.cols}, "local");
  const py::gil_scoped_release unlocked;
  host::local_topk(topk, {num_experts, num_ranks, num_ranks}, rank, out);
}

void first_rows(const Array<int32_t>& counts, Array<int64_t> rows, Array<int64_t> num_received) {
  const auto sent = matrix(counts, "counts");
  expect_shape(counts, {sent.cols, sent.cols}, "counts");
  int64_t* out = result(rows, {sent.cols, sent.cols}, "first_rows");
  int64_t* received = result(num_received, {sent.cols}, "num_received");
  const py::gil_scoped_release unlocked;
  host::first_rows(sent, out, received);
}

void send_rows(const Array<bool>& is_token_in_rank, const Array<int64_t>& first_rows, int64_t num_parts,
               Array<int64_t> rows) {
  const auto in_rank = table(is_token_in_rank);
  expect_shape(first_rows, {in_rank.cols}, "first_rows");
  const int64_t* first = first_rows.data();
  int64_t* out = result(rows, {in_rank.rows, in_rank.cols}, "rows");
  const py::gil_scoped_release unlocked;
  host::send_rows(in_rank, first, num_parts, out);
}

void receive_rows(const py::sequence& is_token_in_rank, int64_t rank, Array<int32_t> src_rank,
                  Array<int32_t> src_token) {
  std::vector<Array<bool>> tables;  // [T_s, R] of each source
  int64_t num_rows = 0;
  for (const py::handle entry : is_token_in_rank) {
    tables.push_back(py::cast<Array<bool>>(entry));
    expect_shape(tables.back(), {-1, int64_t(py::len(is_token_in_rank))}, "is_token_in_rank");
    num_rows += host::count_sent(table(tables.back()), rank);
  }
  int32_t* ranks = result(src_rank, {num_rows}, "src_rank");
  int32_t* tokens = result(src_token, {num_rows}, "src_token");
  int64_t first_row = 0;
  for (size_t source = 0; source < tables.size(); ++source) {
    host::mark_rows(table(tables[source]), int64_t(source), rank, first_row, ranks, tokens);
    first_row += host::count_sent(table(tables[source]), rank);
  }
}

void sources_of_rows(const Array<int64_t>& first_rows, Array<int32_t> sources) {
  expect_shape(first_rows, {-1}, "first_rows");
  int32_t* out = result(sources, {-1}, "sources");
  host::sources_of_rows(first_rows.data(), first_rows.shape(0), sources.shape(0), out);
}

template <class Index>
int64_t expanded_layout(const Array<Index>& recv_topk_idx, int64_t alignment, int64_t num_parts,
                        Array<int64_t> begins, Array<int64_t> ends, Array<int64_t> rows) {
  const auto topk = matrix(recv_topk_idx, "recv_topk_idx");
  int64_t* begin_rows = result(begins, {-1}, "begins");
  const int64_t num_local_experts = begins.shape(0);
  int64_t* end_rows = result(ends, {num_local_experts}, "ends");
  int64_t* out = result(rows, {topk.rows, topk.cols}, "rows");
  const py::gil_scoped_release unlocked;
  return host::expanded_layout(topk, num_local_experts, alignment, num_parts, begin_rows, end_rows, out);
}

template <class Index>
void low_latency_counts(const Array<Index>& topk_idx, int64_t num_experts, int64_t num_ranks,
                        Array<int32_t> rows_per_expert) {
  const auto topk = matrix(topk_idx, "topk_idx");
  int32_t* out = result(rows_per_expert, {num_experts}, "rows_per_expert");
  const py::gil_scoped_release unlocked;
  host::low_latency_counts(topk, {num_experts, num_ranks, num_ranks}, out);
}

void low_latency_ranges(const Array<int32_t>& rows_per_expert, int64_t rank, Array<int64_t> layout_range,
                        Array<int32_t> recv_count) {
  const auto counts = matrix(rows_per_expert, "rows_per_expert");
  if (counts.rows == 0) throw py::value_error("rows_per_expert: got no ranks");
  int64_t* ranges = result(layout_range, {counts.cols / counts.rows, counts.rows}, "layout_range");
  int32_t* received = result(recv_count, {counts.cols / counts.rows}, "recv_count");
  host::low_latency_ranges(counts, rank, ranges, received);
}

template <class Index>
void low_latency_send_rows(const Array<Index>& topk_idx, const Array<int32_t>& rows_per_expert, int64_t source,
                           int64_t num_max_tokens, int64_t num_parts, Array<int64_t> rows) {
  const auto topk = matrix(topk_idx, "topk_idx");
  const auto counts = matrix(rows_per_expert, "rows_per_expert");
  int64_t* out = result(rows, {topk.rows, topk.cols}, "rows");
  const py::gil_scoped_release unlocked;
  host::low_latency_send_rows(topk, counts, source, num_max_tokens, num_parts, out);
}

int64_t forwarding_rank(int64_t source, int64_t domain, int64_t num_ranks, int64_t ranks_per_domain) {
  return host::forwarding_rank({num_ranks, num_ranks, ranks_per_domain}, source, domain);
}

int64_t living_gateway(int64_t source, int64_t domain, int64_t ranks_per_domain, const Array<bool>& alive) {
  expect_shape(alive, {-1}, "alive");
  const host::Group group{alive.shape(0), alive.shape(0), ranks_per_domain};
  return host::living_gateway(group, source, domain, reinterpret_cast<const uint8_t*>(alive.data()));
}

void node_positions(const Array<bool>& is_token_in_rank, int64_t ranks_per_domain, int64_t num_parts,
                    Array<int64_t> masks, Array<int32_t> position, Array<int32_t> counts) {
  const auto in_rank = table(is_token_in_rank);
  const host::Group group{in_rank.cols, in_rank.cols, ranks_per_domain};
  const int64_t num_domains = host::num_domains(group);
  int64_t* bits = result(masks, {in_rank.rows, num_domains}, "masks");
  int32_t* positions = result(position, {in_rank.rows, num_domains}, "position");
  int32_t* sent = result(counts, {num_domains}, "counts");
  const py::gil_scoped_release unlocked;
  host::domain_positions(in_rank, group, num_parts, reinterpret_cast<uint64_t*>(bits), positions, sent);
}

void forwarded_rows(const Array<int64_t>& masks, const Array<int64_t>& first_rows, Array<int64_t> rows) {
  expect_shape(masks, {-1}, "masks");
  expect_shape(first_rows, {-1}, "first_rows");
  int64_t* out = result(rows, {masks.shape(0), first_rows.shape(0)}, "rows");
  host::forwarded_rows(reinterpret_cast<const uint64_t*>(masks.data()), masks.shape(0), first_rows.data(),
                       first_rows.shape(0), out);
}

/// One-dimensional arrays of the gradient codec.
template <class T>
int64_t length_of(const Array<T>& array, const char* name) {
  expect_shape(array, {-1}, name);
  return array.shape(0);
}

host::GradientFormat format_of(const std::string& name) {
  if (name == "fp8") return host::GradientFormat::fp8;
  if (name == "fp16") return host::GradientFormat::fp16;
  if (name == "bf16") return host::GradientFormat::bf16;
  throw py::value_error("format: got " + name + "; expected fp8, fp16 or bf16");
}

void encode_gradients(const std::string& format, const Array<float>& values, Array<uint8_t> message,
                      bool is_nearest, std::pair<uint32_t, uint32_t> key, uint32_t first_index) {
  const auto kind = format_of(format);
  const int64_t count = length_of(values, "values");
  uint8_t* out = result(message, {host::message_bytes(kind, count)}, "message");
  const float* from = values.data();
  const py::gil_scoped_release unlocked;
  host::encode(kind, from, count, {is_nearest, key.first, key.second, first_index}, out);
}

void decode_gradients(const std::string& format, const Array<uint8_t>& message, Array<float> values,
                      bool is_added) {
  const auto kind = format_of(format);
  const int64_t count = length_of(values, "values");
  expect_shape(message, {host::message_bytes(kind, count)}, "message");
  float* out = values.mutable_data();
  const uint8_t* from = message.data();
  const py::gil_scoped_release unlocked;
  host::decode(kind, from, count, is_added, out);
}

void block_exponents(const Array<float>& values, Array<uint8_t> exponents) {
  const int64_t count = length_of(values, "values");
  uint8_t* out = result(exponents, {(count + 127) / 128}, "exponents");
  const float* from = values.data();
  const py::gil_scoped_release unlocked;
  host::block_exponents(from, count, out);
}

void expect_headroom(int32_t headroom) {
  if (headroom < 0 || headroom > 29) throw py::value_error("headroom: expected 0 .. 29");
}

void encode_fixed(const Array<float>& values, const Array<uint8_t>& exponents, int32_t headroom,
                  Array<int32_t> integers) {
  expect_headroom(headroom);
  const int64_t count = length_of(values, "values");
  expect_shape(exponents, {(count + 127) / 128}, "exponents");
  int32_t* out = result(integers, {count}, "integers");
  const float* from = values.data();
  const uint8_t* scales = exponents.data();
  const py::gil_scoped_release unlocked;
  host::encode_fixed(from, count, scales, headroom, out);
}

void decode_fixed(const Array<int32_t>& integers, const Array<uint8_t>& exponents, int32_t headroom,
                  float divisor, Array<float> values) {
  expect_headroom(headroom);
  const int64_t count = length_of(integers, "integers");
  expect_shape(exponents, {(count + 127) / 128}, "exponents");
  float* out = result(values, {count}, "values");
  const int32_t* from = integers.data();
  const uint8_t* scales = exponents.data();
  const py::gil_scoped_release unlocked;
  host::decode_fixed(from, count, scales, headroom, divisor, out);
}

int64_t gradient_message_bytes(const std::string& format, int64_t count) {
  return host::message_bytes(format_of(format), count);
}

/// The functions that take topk_idx, for one index type.
template <class Index>
void bind_topk(py::module_& m) {
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("dispatch_layout", &dispatch_layout<Index>, array("topk_idx"), "num_experts"_a, "num_ranks"_a,
        "ranks_per_node"_a, array("num_tokens_per_rank"), array("num_tokens_per_node"),
        array("num_tokens_per_expert"), array("is_token_in_rank"));
  m.def("rank_masks", &rank_masks<Index>, array("topk_idx"), "num_experts"_a, "num_ranks"_a, array("masks"));
  m.def("local_topk", &local_topk<Index>, array("topk_idx"), "num_experts"_a, "num_ranks"_a, "rank"_a,
        array("local"));
  m.def("expanded_layout", &expanded_layout<Index>, array("recv_topk_idx"), "alignment"_a, "num_parts"_a,
        array("begins"), array("ends"), array("rows"));
  m.def("low_latency_counts", &low_latency_counts<Index>, array("topk_idx"), "num_experts"_a, "num_ranks"_a,
        array("rows_per_expert"));
  m.def("low_latency_send_rows", &low_latency_send_rows<Index>, array("topk_idx"), array("rows_per_expert"),
        "source"_a, "num_max_tokens"_a, "num_parts"_a, array("rows"));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Layout rules shared by the kernels, the emulator and the host. deepep.layout is the typed face.";
  m.attr("MAX_TOPK") = host::max_topk();

  // Arrays are taken as they are or not at all: a converted copy of a result array would be filled in vain.
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  bind_topk<int32_t>(m);
  bind_topk<int64_t>(m);
  m.def("first_rows", &first_rows, array("counts"), array("first_rows"), array("num_received"));
  m.def("send_rows", &send_rows, array("is_token_in_rank"), array("first_rows"), "num_parts"_a, array("rows"));
  m.def("receive_rows", &receive_rows, "is_token_in_rank"_a, "rank"_a, array("src_rank"), array("src_token"));
  m.def("sources_of_rows", &sources_of_rows, array("first_rows"), array("sources"));
  m.def("low_latency_ranges", &low_latency_ranges, array("rows_per_expert"), "rank"_a, array("layout_range"),
        array("recv_count"));
  m.def("forwarding_rank", &forwarding_rank, "source"_a, "node"_a, "num_ranks"_a, "ranks_per_node"_a);
  m.def("living_gateway", &living_gateway, "source"_a, "node"_a, "ranks_per_node"_a, array("alive"));
  m.def("node_positions", &node_positions, array("is_token_in_rank"), "ranks_per_node"_a, "num_parts"_a,
        array("masks"), array("position"), array("counts"));
  m.def("forwarded_rows", &forwarded_rows, array("masks"), array("first_rows"), array("rows"));

  deepep::bindings::bind_crossing(m);
  deepep::bindings::bind_tensor_set(m);

  m.def("max_rows_received", &host::max_rows_received, "num_ranks"_a, "num_max_tokens"_a);
  m.def("max_rows_expanded", &host::max_rows_expanded, "num_ranks"_a, "num_max_tokens"_a, "num_topk"_a,
        "num_local_experts"_a, "alignment"_a, "has_duplicates"_a);
  m.def("receive_slot_bytes", &host::receive_slot_bytes, "num_rows"_a, "row_bytes"_a, "num_scales"_a,
        "num_topk"_a, "index_bytes"_a);
  m.def("low_latency_nic_bytes", &host::low_latency_nic_bytes, "num_ranks"_a, "ranks_per_domain"_a,
        "num_experts"_a, "num_max_tokens"_a, "num_topk"_a, "hidden"_a, "returns_entries"_a, "has_gateways"_a);

  m.def("gradient_message_bytes", &gradient_message_bytes, "format"_a, "count"_a);
  m.def("encode_gradients", &encode_gradients, "format"_a, array("values"), array("message"), "is_nearest"_a,
        "key"_a, "first_index"_a);
  m.def("decode_gradients", &decode_gradients, "format"_a, array("message"), array("values"), "is_added"_a);
  m.def("block_exponents", &block_exponents, array("values"), array("exponents"));
  m.def("encode_fixed", &encode_fixed, array("values"), array("exponents"), "headroom"_a, array("integers"));
  m.def("decode_fixed", &decode_fixed, array("integers"), array("exponents"), "headroom"_a, "divisor"_a,
        array("values"));

  using Buffer = host::LowLatencyBuffer;
  // Local to this module: tests load several builds of it into one process.
  py::class_<Buffer>(m, "LowLatencyBuffer", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), "num_ranks"_a, "num_max_tokens"_a, "hidden"_a,
           "num_topk"_a)
      .def("dispatch_message_bytes", &Buffer::dispatch_message_bytes)
      .def("combine_message_bytes", &Buffer::combine_message_bytes)
      .def("dispatch_flag", &Buffer::dispatch_flag, "epoch"_a, "source"_a)
      .def("combine_flag", &Buffer::combine_flag, "epoch"_a, "source"_a)
      .def("dispatch_send", &Buffer::dispatch_send, "epoch"_a, "token"_a)
      .def("dispatch_slot", &Buffer::dispatch_slot, "epoch"_a, "source"_a, "position"_a)
      .def("combine_slot", &Buffer::combine_slot, "epoch"_a, "token"_a, "k"_a)
      .def("total_bytes", &Buffer::total_bytes)
      .def_static("num_epochs", &Buffer::num_epochs);
}
