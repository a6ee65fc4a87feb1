#include "kernels/low_latency_rails/combine.hpp"
#include "kernels/low_latency_rails/dispatch.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/low_latency_rails/launch.hpp"

namespace deepep::kernels {

namespace {

constexpr const char* kDispatch = "low-latency dispatch in two levels";
constexpr const char* kCombine = "low-latency combine in two levels";

/// By form: plain, watching.
constexpr Kernel<RailDispatchArgs> kRailDispatches[] = {low_latency_rail_dispatch_kernel,
                                                        low_latency_rail_dispatch_kernel_watching};
constexpr Kernel<RailCombineArgs> kRailCombines[] = {low_latency_rail_combine_kernel,
                                                     low_latency_rail_combine_kernel_watching};

}  // namespace

void launch_low_latency(const RailDispatchArgs& args, int num_blocks, Halves, void* stream) {
  launch(kRailDispatches[has_to_watch(args) ? 1 : 0], args, num_blocks, kLowLatencyThreads,
         far_shared_of(args).bytes(), stream, kDispatch);
}

void launch_low_latency(const RailCombineArgs& args, int num_blocks, Halves, void* stream) {
  launch_allowed(kRailCombines[has_to_watch(args) ? 1 : 0], args, num_blocks, kLowLatencyThreads,
                 rail_shared_of(args).bytes(), stream, kCombine);
}

void load_low_latency_rails() {
  const int shared_bytes = most_shared_bytes();
  for (const auto kernel : kRailDispatches) load(kernel, kDispatch);
  for (const auto kernel : kRailCombines) allow_shared(kernel, shared_bytes, kCombine);
}

}  // namespace deepep::kernels
