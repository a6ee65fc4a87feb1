// Kernels that serve puts, beside the operations that order them.
#pragma once

#include "host/event.hpp"
#include "kernels/common/launch.cuh"

namespace deepep::host {

/// Where the serving kernel runs: a stream beside the one that an operation is launched on. Of the device that
/// is current when it is made.
class PutStream {
 public:
  PutStream() {
    int least = 0, greatest = 0;
    kernels::check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    kernels::check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
                   "cudaStreamCreateWithPriority");
  }
  ~PutStream() { (void)cudaStreamDestroy(stream_); }
  PutStream(const PutStream&) = delete;
  PutStream& operator=(const PutStream&) = delete;

  /// `serve` begins when `operation` may, and what follows on `on` runs when both have ended.
  template <class Serve, class Launch>
  void beside(void* on, const Serve& serve, const Launch& operation) {
    auto* stream = static_cast<cudaStream_t>(on);
    begin_.record(stream);
    begin_.hold_back(stream_);
    serve(stream_);
    operation();
    end_.record(stream_);
    end_.hold_back(stream);
  }

 private:
  cudaStream_t stream_{};
  Event begin_;
  Event end_;
};

}  // namespace deepep::host
