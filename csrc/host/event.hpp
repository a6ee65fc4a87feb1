// CUDA's current device and its events, held by scope.
#pragma once

#include "kernels/common/launch.cuh"

namespace deepep::host {

/// The device of a Domain is the current one inside, whatever the caller's is.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : wanted_(device) {
    kernels::check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != wanted_) kernels::check(cudaSetDevice(wanted_), "cudaSetDevice");
  }
  ~DeviceScope() {
    if (before_ != wanted_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int wanted_;
  int before_ = 0;
};

/// A point on a stream, for other streams and the host to wait on.
class Event {
 public:
  Event() {
    kernels::check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { kernels::check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void hold_back(cudaStream_t stream) {
    kernels::check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
  }
  /// Whether what was recorded last has been done. Asking disturbs no thread's capture.
  [[nodiscard]] bool has_passed() const {
    auto mode = cudaStreamCaptureModeRelaxed;
    kernels::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const cudaError_t status = cudaEventQuery(event_);
    kernels::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    if (status == cudaErrorNotReady)
      (void)cudaGetLastError();
    else
      kernels::check(status, "cudaEventQuery");
    return status == cudaSuccess;
  }
  void wait() { kernels::check(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_{};
};

}  // namespace deepep::host
