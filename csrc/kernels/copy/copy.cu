#include "kernels/copy/copy.hpp"

#include "kernels/common/launch.cuh"
#include "kernels/common/launch.hpp"
#include "kernels/copy/bulk_copy.hpp"
#include "kernels/copy/hold.hpp"

namespace deepep::kernels {

/// For a load of a bulk copy: memory that does not answer for so long never will.
constexpr uint64_t kTimeoutNs = 10'000'000'000;

void launch_copy(const std::byte* from, std::byte* to, int64_t bytes, int num_blocks, void* stream) {
  launch<CopyArgs>(copy_kernel, CopyArgs{from, to, bytes}, num_blocks, kThreads, 0, stream, "copy");
}

void launch_bulk_copy(const std::byte* from, std::byte* to, int64_t bytes, int num_warps, int num_stages,
                      int64_t stage_bytes, int num_blocks, void* stream) {
  const auto refuse = [](const char* what) { throw std::invalid_argument(std::string("bulk copy: ") + what); };
  if (num_warps < 1 || num_warps > kThreads / 32) refuse("warps: 1 to 32");
  if (num_stages < kMinStages) refuse("stages of a warp: at least 3");
  if (stage_bytes < 16 || stage_bytes % 16 != 0) refuse("bytes of a stage: a positive multiple of 16");
  if (bytes < 0 || bytes % 16 != 0) refuse("bytes: a multiple of 16");
  const int64_t shared = BulkCopyShared{num_warps, num_stages, stage_bytes}.bytes();
  if (!has_bulk_copies<BulkCopyArgs>(bulk_copy_kernel, "bulk copy")) refuse("compute capability 9.0 and up");
  if (shared > most_shared_bytes()) refuse("the stages of a block do not fit into its shared memory");
  const BulkCopyArgs args{.from = from,
                          .to = to,
                          .bytes = bytes,
                          .stage_bytes = stage_bytes,
                          .num_stages = num_stages,
                          .timeout_ns = kTimeoutNs};
  launch<BulkCopyArgs>(bulk_copy_kernel, args, num_blocks, 32 * num_warps, shared, stream, "bulk copy");
}

void launch_hold(uint64_t nanoseconds, int num_blocks, void* stream) {
  const HoldArgs args{nanoseconds < kTimeoutNs ? nanoseconds : kTimeoutNs};
  launch<HoldArgs>(hold_kernel, args, num_blocks, kThreads, most_shared_bytes(), stream, "hold");
}

}  // namespace deepep::kernels
