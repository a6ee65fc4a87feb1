// Memory of a GPU, by the driver's copies and stream writes; nothing where there is no driver. No CUDA header:
// the few functions are looked up by name, so that a machine without CUDA builds this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loopverbs {

class Gpu {
 public:
  /// The process's only one.
  static Gpu& instance();

  [[nodiscard]] bool owns(const void* address) const;
  /// Takes the caller's context, and a stream in it that waits for nobody's kernels: made before any runs.
  void adopt();
  /// Makes host memory quick to copy from and to, if a context was adopted.
  [[nodiscard]] bool pin(void* address, uint64_t bytes);
  void read(std::byte* to, uint64_t from, uint64_t bytes);
  /// Words of 8 bytes are written at once, behind all that was written before.
  void write(uint64_t to, const std::byte* from, uint64_t bytes);

 private:
  using Result = int;
  Gpu();
  void enter();
  void check(Result result, const char* what) const;

  Result (*pointer_attribute_)(void*, int, uint64_t) = nullptr;
  Result (*get_current_)(void**) = nullptr;
  Result (*set_current_)(void*) = nullptr;
  Result (*stream_create_)(void**, unsigned) = nullptr;
  Result (*synchronize_)(void*) = nullptr;
  Result (*to_host_)(void*, uint64_t, size_t, void*) = nullptr;
  Result (*to_device_)(uint64_t, const void*, size_t, void*) = nullptr;
  Result (*write64_)(void*, uint64_t, uint64_t, unsigned) = nullptr;
  Result (*pin_)(void*, size_t, unsigned) = nullptr;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  bool here_ = false;
};

}  // namespace loopverbs
