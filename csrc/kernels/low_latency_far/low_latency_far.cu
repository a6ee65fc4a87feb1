#include "kernels/low_latency_far/combine.hpp"
#include "kernels/low_latency_far/combine_exact.hpp"
#include "kernels/low_latency_far/combine_exact_receive.hpp"
#include "kernels/low_latency_far/combine_exact_send.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt_receive.hpp"
#include "kernels/low_latency_far/combine_exact_logfmt_send.hpp"
#include "kernels/low_latency_far/combine_logfmt.hpp"
#include "kernels/low_latency_far/combine_logfmt_receive.hpp"
#include "kernels/low_latency_far/combine_logfmt_send.hpp"
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

#define DEEPEP_FORMS(name) {name, name##_watching}
#define DEEPEP_ONE_FORM(name) {name, name}

/// By what goes back, then as dispatches.
constexpr Kernel<FarCombineArgs> kFarCombines[][3][2] = {
    {DEEPEP_FORMS(low_latency_far_combine_kernel), DEEPEP_FORMS(low_latency_far_combine_send_kernel),
     DEEPEP_FORMS(low_latency_far_combine_receive_kernel)},
    {DEEPEP_FORMS(low_latency_far_combine_logfmt_kernel),
     DEEPEP_FORMS(low_latency_far_combine_logfmt_send_kernel),
     DEEPEP_FORMS(low_latency_far_combine_logfmt_receive_kernel)},
    {DEEPEP_FORMS(low_latency_far_combine_exact_kernel),
     DEEPEP_ONE_FORM(low_latency_far_combine_exact_send_kernel),
     DEEPEP_FORMS(low_latency_far_combine_exact_receive_kernel)},
    {DEEPEP_FORMS(low_latency_far_combine_exact_logfmt_kernel),
     DEEPEP_ONE_FORM(low_latency_far_combine_exact_logfmt_send_kernel),
     DEEPEP_FORMS(low_latency_far_combine_exact_logfmt_receive_kernel)},
};

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
  const auto& kernels = kFarCombines[static_cast<int>(args.returned)];
  launch_allowed(kernel_for(kernels, args, halves), args, num_blocks, kLowLatencyThreads,
                 far_shared_of(args).bytes(), stream, kCombine);
}

BlockSize load_far_low_latency() {
  const int shared_bytes = most_shared_bytes();
  for (const auto& forms : kFarDispatches)
    for (const auto kernel : forms) load(kernel, kDispatch);
  for (const auto& halves : kFarCombines)
    for (const auto& forms : halves)
      for (const auto kernel : forms) allow_shared(kernel, shared_bytes, kCombine);
  const bool bulk = has_bulk_copies(kFarCombines[0][0][0], kCombine);
  return {.num_warps = kLowLatencyThreads / dev::kWarpSize, .bulk_bytes = bulk ? shared_bytes : 0};
}

}  // namespace deepep::kernels
