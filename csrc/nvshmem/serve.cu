// Puts between processes, over NVSHMEM: the only source that needs its device library, of a module of its own.
// NVSHMEM's host library, which nvshmem4py loads, has to be there before the module is, and fills in its state.
#include <cuda.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include "put_server/serve.cuh"

#include "kernels/common/launch.cuh"
#include "put_server/service.hpp"

namespace deepep::put_server {

namespace {

/// Warps put together: where NVSHMEM maps a peer's memory, their lanes copy.
__global__ void __launch_bounds__(kThreads) serve_nvshmem_kernel(const __grid_constant__ PutService service) {
  using namespace dev;
  serve(service.queue, service.timeout_ns, [&](const PutOrder& order, uint32_t) {
    const int pe = service.pe[order.rank];
    // NVSHMEM's own fence in front of what its proxy reads is of one GPU.
    fence<acq_rel, sys_scope>();
    if (order.bytes > 0) {
      nvshmemx_putmem_signal_nbi_warp(order.to, order.from, static_cast<size_t>(order.bytes), order.word,
                                      order.value, NVSHMEM_SIGNAL_ADD, pe);
    } else if (lane() == 0) {
      // Not a put without bytes, which reads outside of its table of keys over IBGDA.
      nvshmemx_signal_op(order.word, order.value, NVSHMEM_SIGNAL_ADD, pe);
    }
    sync_warp();
  });
}

}  // namespace

void serve_nvshmem(const PutService& service, void* stream) {
  serve_nvshmem_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(service);
  kernels::check(cudaGetLastError(), "serve_nvshmem");
}

CUmodule nvshmem_module() {
  cudaFunction_t function{};
  kernels::check(cudaGetFuncBySymbol(&function, reinterpret_cast<const void*>(&serve_nvshmem_kernel)),
                 "cudaGetFuncBySymbol");
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  kernels::check(cudaGetDriverEntryPointByVersion("cuFuncGetModule", &entry, 12000, cudaEnableDefault, &found),
                 "cuFuncGetModule");
  CUmodule module{};
  const auto get = reinterpret_cast<CUresult (*)(CUmodule*, CUfunction)>(entry);
  if (found != cudaDriverEntryPointSuccess || get(&module, function) != CUDA_SUCCESS)
    throw std::runtime_error("cuFuncGetModule: no module of the kernel that puts");
  return module;
}

}  // namespace deepep::put_server
