#include "kernels/low_latency/combine.hpp"
#include "kernels/low_latency/combine_exact.hpp"
#include "kernels/low_latency/combine_exact_logfmt.hpp"
#include "kernels/low_latency/combine_exact_logfmt_receive.hpp"
#include "kernels/low_latency/combine_exact_logfmt_send.hpp"
#include "kernels/low_latency/combine_exact_receive.hpp"
#include "kernels/low_latency/combine_exact_send.hpp"
#include "kernels/low_latency/combine_logfmt.hpp"
#include "kernels/low_latency/combine_logfmt_receive.hpp"
#include "kernels/low_latency/combine_logfmt_send.hpp"
#include "kernels/low_latency/combine_receive.hpp"
#include "kernels/low_latency/combine_send.hpp"
#include "kernels/low_latency/dispatch.hpp"
#include "kernels/low_latency/dispatch_receive.hpp"
#include "kernels/low_latency/dispatch_send.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/low_latency/launch.hpp"

namespace deepep::kernels {

namespace {

Kernel<LowLatencyDispatchArgs> dispatch_of(Halves halves) {
  switch (halves) {
    case Halves::kSend: return low_latency_dispatch_send_kernel;
    case Halves::kReceive: return low_latency_dispatch_receive_kernel;
    default: return low_latency_dispatch_kernel;
  }
}

/// By what goes back, then by halves.
constexpr Kernel<LowLatencyCombineArgs> kCombines[][3] = {
    {low_latency_combine_kernel, low_latency_combine_send_kernel, low_latency_combine_receive_kernel},
    {low_latency_combine_logfmt_kernel, low_latency_combine_logfmt_send_kernel,
     low_latency_combine_logfmt_receive_kernel},
    {low_latency_combine_exact_kernel, low_latency_combine_exact_send_kernel,
     low_latency_combine_exact_receive_kernel},
    {low_latency_combine_exact_logfmt_kernel, low_latency_combine_exact_logfmt_send_kernel,
     low_latency_combine_exact_logfmt_receive_kernel},
};

Kernel<LowLatencyCombineArgs> combine_of(Returned returned, Halves halves) {
  return kCombines[static_cast<int>(returned)][static_cast<int>(halves)];
}

}  // namespace

int low_latency_warps() { return kLowLatencyThreads / dev::kWarpSize; }

void launch_low_latency(const LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream) {
  launch(dispatch_of(halves), args, num_blocks, kLowLatencyThreads, shared_of(args).bytes(), stream,
         "low-latency dispatch");
}

void launch_low_latency(const LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream) {
  launch(combine_of(args.returned, halves), args, num_blocks, kLowLatencyThreads, shared_of(args).bytes(),
         stream, "low-latency combine");
}

void load_low_latency() {
  for (const Halves halves : {Halves::kBoth, Halves::kSend, Halves::kReceive}) {
    load(dispatch_of(halves), "low-latency dispatch");
    for (const auto& combines : kCombines) load(combines[static_cast<int>(halves)], "low-latency combine");
  }
}

}  // namespace deepep::kernels
