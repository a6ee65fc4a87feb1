#include "kernels/low_latency_far/combine.hpp"
#include "kernels/low_latency_far/combine_receive.hpp"
#include "kernels/low_latency_far/combine_send.hpp"
#include "kernels/low_latency_far/dispatch.hpp"
#include "kernels/low_latency_far/dispatch_receive.hpp"
#include "kernels/low_latency_far/dispatch_send.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/low_latency_far/launch.hpp"

namespace deepep::kernels {

namespace {

constexpr const char* kDispatch = "low-latency dispatch between domains";
constexpr const char* kCombine = "low-latency combine between domains";

/// By halves, then by form: plain, watching. A send that waits for nothing has one form.
constexpr Kernel<FarDispatchArgs> kFarDispatches[][2] = {
    {low_latency_far_dispatch_kernel, low_latency_far_dispatch_kernel_watching},
    {low_latency_far_dispatch_send_kernel, low_latency_far_dispatch_send_kernel},
    {low_latency_far_dispatch_receive_kernel, low_latency_far_dispatch_receive_kernel_watching}};

constexpr Kernel<FarCombineArgs> kFarCombines[][2] = {
    {low_latency_far_combine_kernel, low_latency_far_combine_kernel_watching},
    {low_latency_far_combine_send_kernel, low_latency_far_combine_send_kernel_watching},
    {low_latency_far_combine_receive_kernel, low_latency_far_combine_receive_kernel_watching}};

template <class Kernels, class Args>
[[nodiscard]] auto kernel_for(const Kernels& kernels, const Args& args, Halves halves) {
  return kernels[static_cast<int>(halves)][has_to_watch(args) ? 1 : 0];
}

}  // namespace

void launch_low_latency(const FarDispatchArgs& args, int num_blocks, Halves halves, void* stream) {
  launch(kernel_for(kFarDispatches, args, halves), args, num_blocks, kLowLatencyThreads,
         far_shared_of(args).bytes(), stream, kDispatch);
}

void launch_low_latency(const FarCombineArgs& args, int num_blocks, Halves halves, void* stream) {
  launch_allowed(kernel_for(kFarCombines, args, halves), args, num_blocks, kLowLatencyThreads,
                 far_shared_of(args).bytes(), stream, kCombine);
}

BlockSize load_far_low_latency() {
  const int shared_bytes = most_shared_bytes();
  for (const auto& forms : kFarDispatches)
    for (const auto kernel : forms) load(kernel, kDispatch);
  for (const auto& forms : kFarCombines)
    for (const auto kernel : forms) allow_shared(kernel, shared_bytes, kCombine);
  const bool bulk = has_bulk_copies(kFarCombines[0][0], kCombine);
  return {.num_warps = kLowLatencyThreads / dev::kWarpSize, .bulk_bytes = bulk ? shared_bytes : 0};
}

}  // namespace deepep::kernels
