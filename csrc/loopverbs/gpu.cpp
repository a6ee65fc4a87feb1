#include "loopverbs/gpu.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "loopverbs/settings.hpp"

namespace loopverbs {

namespace {

constexpr int kMemoryType = 2;       // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
constexpr unsigned kDevice = 2;      // CU_MEMORYTYPE_DEVICE
constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING

template <class Function>
bool find(void* library, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

Gpu& Gpu::instance() {
  static Gpu* one = new Gpu;  // lives to the end of the process: the NIC's thread uses it
  return *one;
}

Gpu::Gpu() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  here_ = library != nullptr && find(library, pointer_attribute_, "cuPointerGetAttribute") &&
          find(library, get_current_, "cuCtxGetCurrent") && find(library, set_current_, "cuCtxSetCurrent") &&
          find(library, stream_create_, "cuStreamCreate") &&
          find(library, synchronize_, "cuStreamSynchronize") &&
          find(library, to_host_, "cuMemcpyDtoHAsync_v2") &&
          find(library, to_device_, "cuMemcpyHtoDAsync_v2") && find(library, pin_, "cuMemHostRegister_v2");
  if (here_ && !find(library, write64_, "cuStreamWriteValue64_v2")) {
    find(library, write64_, "cuStreamWriteValue64");
  }
}

bool Gpu::owns(const void* address) const {
  unsigned type = 0;
  return here_ && pointer_attribute_(&type, kMemoryType, reinterpret_cast<uint64_t>(address)) == 0 &&
         type == kDevice;
}

void Gpu::check(Result result, const char* what) const {
  if (result != 0) die("%s: CUDA error %d", what, result);
}

void Gpu::adopt() {
  if (!here_ || stream_ != nullptr || get_current_(&context_) != 0 || context_ == nullptr) return;
  check(stream_create_(&stream_, kNonBlocking), "cuStreamCreate");
}

void Gpu::enter() {
  static thread_local bool entered = false;
  if (!entered) check(set_current_(context_), "cuCtxSetCurrent");
  entered = true;
}

bool Gpu::pin(void* address, uint64_t bytes) {
  return here_ && context_ != nullptr && pin_(address, bytes, 0) == 0;
}

void Gpu::read(std::byte* to, uint64_t from, uint64_t bytes) {
  enter();
  check(to_host_(to, from, bytes, stream_), "cuMemcpyDtoH");
  check(synchronize_(stream_), "cuStreamSynchronize");
}

void Gpu::write(uint64_t to, const std::byte* from, uint64_t bytes) {
  enter();
  uint64_t value = 0;
  memcpy(&value, from, std::min<uint64_t>(bytes, 8));
  const bool word = bytes == 8 && to % 8 == 0 && write64_ != nullptr;
  if (!word || write64_(stream_, to, value, 0) != 0) {
    if (word) write64_ = nullptr;
    check(to_device_(to, from, bytes, stream_), "cuMemcpyHtoD");
  }
  check(synchronize_(stream_), "cuStreamSynchronize");
}

}  // namespace loopverbs
