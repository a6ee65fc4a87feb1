// deepep._nvshmem: what serves puts over NVSHMEM, for deepep._cuda to launch. No torch.
#include <cuda.h>
#include <pybind11/pybind11.h>

#include "put_server/service.hpp"

namespace deepep::put_server {

void serve_nvshmem(const PutService& service, void* stream);
/// The module of its kernel on the current device, whose state NVSHMEM's host library is to fill in.
CUmodule nvshmem_module();

}  // namespace deepep::put_server

PYBIND11_MODULE(_nvshmem, m) {
  m.doc() = "Serves the puts of deepep's kernels over NVSHMEM.";
  m.def("serve", [] { return reinterpret_cast<uintptr_t>(&deepep::put_server::serve_nvshmem); },
        "The address of the function, a ServePuts (csrc/put_server/service.hpp).");
  m.def("module", [] { return reinterpret_cast<uintptr_t>(deepep::put_server::nvshmem_module()); },
        "The CUmodule of its kernel on the current device.");
}
