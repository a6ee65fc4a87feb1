// deepep._core: the layout rules of csrc/core for Python, over plain buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/arith.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Layout rules shared by the kernels, the emulator and the host.";
  m.def("align_up", &deepep::core::align_up, py::arg("a"), py::arg("unit"));
}
