// The product's kernels for Python, launched on an emulated machine with the calls of deepep._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "emulator/machine/machine.hpp"

namespace deepep::emu {

/// A set of kernels as Python holds it. Its library is never unloaded: failures keep names that live in it.
struct Kernels {
  const KernelSet* set;
};

void bind_domain(pybind11::module_& m);

}  // namespace deepep::emu
