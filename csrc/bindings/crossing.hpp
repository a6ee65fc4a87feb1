// What Python sees of crossings between domains: layout/rules/crossing.hpp.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "layout/rules/crossing.hpp"

namespace deepep::bindings {

/// Adds the rules of crossings to a module.
inline void bind_crossing(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.attr("CHUNK_RECORDS") = host::chunk_records();
  m.def("num_windows", &host::num_windows, "num_tokens"_a, "window"_a);
  m.def(
      "window_tokens",
      [](int64_t num_tokens, int64_t window, int64_t w) {
        const host::TokenRange range = host::window_tokens(num_tokens, window, w);
        return std::make_pair(range.begin, range.end);
      },
      "num_tokens"_a, "window"_a, "w"_a);
  m.def(
      "window_turn",
      [](int64_t number) {
        const host::Turn turn = host::window_turn(number);
        return py::make_tuple(turn.half, turn.arrivals, turn.credit);
      },
      "number"_a);
  m.def("default_window", &host::default_window, "num_domains"_a);
  m.def("chunk_of_record", &host::chunk_of_record, "position"_a);
  m.def("records_in_chunk", &host::records_in_chunk, "num_records"_a, "chunk"_a);
  m.def("peer_of_domain", &host::peer_of_domain, "domain"_a, "own"_a);
  m.def("domain_of_peer", &host::domain_of_peer, "peer"_a, "own"_a);

  // Local to the module, as LowLatencyBuffer.
  using Sizes = host::RecordSizes;
  py::class_<Sizes>(m, "RecordSizes", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), "row_bytes"_a, "num_scales"_a, "domain_ranks"_a,
           "num_topk"_a)
      .def("scales", &Sizes::scales)
      .def("token", &Sizes::token)
      .def("final_row", &Sizes::final_row, "local"_a)
      .def("index", &Sizes::index, "k"_a)
      .def("weight", &Sizes::weight, "k"_a)
      .def("bytes", &Sizes::bytes)
      .def("return_weight", &Sizes::return_weight, "k"_a)
      .def("return_bytes", &Sizes::return_bytes);

  using Buffer = host::CrossingBuffer;
  py::class_<Buffer>(m, "CrossingBuffer", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), "num_domains"_a, "window"_a,
           "record_bytes"_a, "return_bytes"_a, "copies"_a, "mailbox_words"_a)
      .def("num_chunks", &Buffer::num_chunks)
      .def("chunk_bytes", &Buffer::chunk_bytes)
      .def("mailbox", &Buffer::mailbox, "peer"_a, "parity"_a)
      .def("mailbox_signal", &Buffer::mailbox_signal, "peer"_a, "parity"_a)
      .def("credit", &Buffer::credit, "peer"_a, "half"_a)
      .def("arrived", &Buffer::arrived, "peer"_a, "half"_a, "chunk"_a)
      .def("receive_chunk", &Buffer::receive_chunk, "peer"_a, "half"_a, "chunk"_a)
      .def("send_chunk", &Buffer::send_chunk, "peer"_a, "half"_a, "chunk"_a)
      .def("record", &Buffer::record, "position"_a)
      .def("total_bytes", &Buffer::total_bytes)
      .def("staged_row", &Buffer::staged_row, "peer"_a, "half"_a, "position"_a, "copy"_a)
      .def("staging_bytes", &Buffer::staging_bytes);
}

}  // namespace deepep::bindings
