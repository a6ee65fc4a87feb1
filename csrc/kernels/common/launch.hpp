// The host's side of each kernel: how much shared memory, how many blocks; and the launch.
#pragma once

#include "kernels/common/args.hpp"
#include "kernels/common/steps.hpp"

namespace deepep::kernels {

/// Warps of a block of dispatch and combine.
inline constexpr int kThroughputWarps = 16;

/// Throws std::runtime_error with CUDA's words if a launch is refused. `stream` is a cudaStream_t.
/// `lines`: where warps write their time lines, of a kernel that has such a form (args.hpp: `records`).
void launch_dispatch(const DispatchArgs& args, int num_blocks, void* stream, const Lines& lines);
void launch_combine(const CombineArgs& args, int num_blocks, void* stream, const Lines& lines);
void launch_layout(const LayoutArgs& args, int num_blocks, void* stream);
void launch_barrier(const Group& group, void* stream);
/// Blocks that take an SM each, for so long, at most ten seconds.
void launch_hold(uint64_t nanoseconds, int num_blocks, void* stream);
void launch_copy(const std::byte* from, std::byte* to, int64_t bytes, int num_blocks, void* stream);
/// Loads the kernels of all modes onto the current device, before any runs: those of rare ones might else be
/// loaded while a peer's kernel waits for them.
void load_dispatch();
void load_combine();
/// Through bulk copies: `num_stages` of `stage_bytes` for each of a block's `num_warps`. Throws
/// std::invalid_argument if they do not fit.
void launch_bulk_copy(const std::byte* from, std::byte* to, int64_t bytes, int num_warps, int num_stages,
                      int64_t stage_bytes, int num_blocks, void* stream);

}  // namespace deepep::kernels
