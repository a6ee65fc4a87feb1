// The order of a rank's operations, and what may be asked of a stream.
#pragma once

#include "host/event.hpp"

namespace deepep::host {

[[nodiscard]] inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  kernels::check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

/// Whether a stream has done all it holds. One that is being captured has not; asking disturbs no thread's
/// capture.
[[nodiscard]] inline bool is_idle(cudaStream_t stream) {
  auto mode = cudaStreamCaptureModeRelaxed;
  kernels::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cudaStreamCaptureStatus capturing{};
  cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  const bool may_ask = status == cudaSuccess && capturing == cudaStreamCaptureStatusNone;
  if (may_ask) status = cudaStreamQuery(stream);
  kernels::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  if (status == cudaErrorNotReady || status == cudaErrorStreamCaptureImplicit)
    (void)cudaGetLastError();
  else
    kernels::check(status, "cudaStreamQuery");
  return may_ask && status == cudaSuccess;
}

/// One rank's operations run one after the other, on whatever streams they are launched: its kernels count
/// their calls in one place. What is captured into a graph is ordered by whoever launches the graph.
class Turns {
 public:
  template <class Launch>
  void take(cudaStream_t stream, const Launch& launch) {
    if (is_capturing(stream)) return launch();
    unsigned long long id = 0;
    kernels::check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    if (any_ && id != last_) ended_.hold_back(stream);
    launch();
    ended_.record(stream);
    last_ = id;
    any_ = true;
  }
  /// Blocks the host until the last operation has ended.
  void wait() { ended_.wait(); }

 private:
  Event ended_;
  unsigned long long last_ = 0;
  bool any_ = false;
};

}  // namespace deepep::host
