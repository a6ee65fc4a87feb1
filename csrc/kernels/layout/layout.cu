#include "kernels/layout/layout.hpp"

#include "kernels/barrier/barrier.hpp"
#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"

namespace deepep::kernels {

void launch_layout(const LayoutArgs& args, int num_blocks, void* stream) {
  const int64_t domains = layout::ceil_div(args.num_ranks, args.ranks_per_domain);
  const int64_t bytes = 4 * (args.num_experts + args.num_ranks + domains + 4);
  launch<LayoutArgs>(layout_kernel, args, num_blocks, kThreads, bytes, stream, "layout");
}

void launch_barrier(const Group& group, void* stream) {
  launch<BarrierArgs>(barrier_kernel, BarrierArgs{group}, 1, kThreads, 16, stream, "barrier");
}

}  // namespace deepep::kernels
