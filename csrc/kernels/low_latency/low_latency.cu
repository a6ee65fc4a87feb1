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

template <class Args>
struct Forms {
  Kernel<Args> plain;
  Kernel<Args> watching;

  [[nodiscard]] Kernel<Args> of(const Args& args) const { return has_to_watch(args) ? watching : plain; }
};

#define DEEPEP_FORMS(name) {name, name##_watching}
#define DEEPEP_ONE_FORM(name) {name, name}

/// By halves. A send that waits for nothing has one form.
constexpr Forms<LowLatencyDispatchArgs> kDispatches[] = {DEEPEP_FORMS(low_latency_dispatch_kernel),
                                                         DEEPEP_ONE_FORM(low_latency_dispatch_send_kernel),
                                                         DEEPEP_FORMS(low_latency_dispatch_receive_kernel)};

/// By what goes back, then by halves.
constexpr Forms<LowLatencyCombineArgs> kCombines[][3] = {
    {DEEPEP_FORMS(low_latency_combine_kernel), DEEPEP_FORMS(low_latency_combine_send_kernel),
     DEEPEP_FORMS(low_latency_combine_receive_kernel)},
    {DEEPEP_FORMS(low_latency_combine_logfmt_kernel), DEEPEP_FORMS(low_latency_combine_logfmt_send_kernel),
     DEEPEP_FORMS(low_latency_combine_logfmt_receive_kernel)},
    {DEEPEP_FORMS(low_latency_combine_exact_kernel), DEEPEP_ONE_FORM(low_latency_combine_exact_send_kernel),
     DEEPEP_FORMS(low_latency_combine_exact_receive_kernel)},
    {DEEPEP_FORMS(low_latency_combine_exact_logfmt_kernel),
     DEEPEP_ONE_FORM(low_latency_combine_exact_logfmt_send_kernel),
     DEEPEP_FORMS(low_latency_combine_exact_logfmt_receive_kernel)},
};

template <class Args>
void load_for_shared(const Forms<Args>& forms, const char* what) {
  load_for_shared(forms.plain, what);
  load_for_shared(forms.watching, what);
}

}  // namespace

void launch_low_latency(const LowLatencyDispatchArgs& args, int num_blocks, Halves halves, void* stream,
                        const Lines& lines) {
  if (lines.words != nullptr)
    return launch_allowed(low_latency_dispatch_kernel_recorded, Recorded<LowLatencyDispatchArgs>{args, lines},
                          num_blocks, kLowLatencyThreads, shared_of(args).bytes(), stream,
                          "low-latency dispatch");
  launch_allowed(kDispatches[static_cast<int>(halves)].of(args), args, num_blocks, kLowLatencyThreads,
                 shared_of(args).bytes(), stream, "low-latency dispatch");
}

void launch_low_latency(const LowLatencyCombineArgs& args, int num_blocks, Halves halves, void* stream,
                        const Lines& lines) {
  if (lines.words != nullptr)
    return launch_allowed(low_latency_combine_kernel_recorded, Recorded<LowLatencyCombineArgs>{args, lines},
                          num_blocks, kLowLatencyThreads, shared_of(args).bytes(), stream,
                          "low-latency combine");
  launch_allowed(kCombines[static_cast<int>(args.returned)][static_cast<int>(halves)].of(args), args,
                 num_blocks, kLowLatencyThreads, shared_of(args).bytes(), stream, "low-latency combine");
}

BlockSize load_low_latency() {
  for (const auto& dispatch : kDispatches) load_for_shared(dispatch, "low-latency dispatch");
  for (const auto& combines : kCombines)
    for (const auto& combine : combines) load_for_shared(combine, "low-latency combine");
  load_for_shared(low_latency_dispatch_kernel_recorded, "low-latency dispatch");
  load_for_shared(low_latency_combine_kernel_recorded, "low-latency combine");
  const bool bulk = has_bulk_copies(kCombines[0][0].plain, "low-latency combine");
  return {.num_warps = kLowLatencyThreads / dev::kWarpSize, .bulk_bytes = bulk ? most_shared_bytes() : 0};
}

}  // namespace deepep::kernels
