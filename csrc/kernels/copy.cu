#include "kernels/copy.hpp"

#include "kernels/launch.cuh"
#include "kernels/launch.hpp"

namespace deepep::kernels {

void launch_copy(const std::byte* from, std::byte* to, int64_t bytes, int num_blocks, void* stream) {
  launch<CopyArgs>(copy_kernel, CopyArgs{from, to, bytes}, num_blocks, kThreads, 0, stream, "copy");
}

}  // namespace deepep::kernels
