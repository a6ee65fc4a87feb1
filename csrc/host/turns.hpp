// The order of a rank's operations, what they have reported, and what may be asked of a stream.
#pragma once

#include <cstddef>
#include <optional>

#include "host/event.hpp"
#include "kernels/common/args.hpp"

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
/// their calls in one place, and wait for peers with blocks that need SMs. What is captured into a graph is
/// ordered by whoever launches the graph. On the device that is current when it is made.
class Turns {
 public:
  Turns() { kernels::check(cudaGetDevice(&device_), "cudaGetDevice"); }

  /// Launches on a stream. True if that is being captured.
  template <class Launch>
  bool take(void* on, const Launch& launch) {
    const DeviceScope scope(device_);
    auto* stream = static_cast<cudaStream_t>(on);
    if (is_capturing(stream)) {
      launch();
      return true;
    }
    unsigned long long id = 0;
    kernels::check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    if (any_ && id != last_) ended_.hold_back(stream);
    launch();
    ended_.record(stream);
    last_ = id;
    any_ = true;
    return false;
  }

  /// What `stream` gets from now on runs after what `before` holds now.
  void follow(void* before, void* stream) {
    const DeviceScope scope(device_);
    fork_.record(static_cast<cudaStream_t>(before));
    fork_.hold_back(static_cast<cudaStream_t>(stream));
  }

  /// Blocks the host until the last operation has ended.
  void wait() {
    const DeviceScope scope(device_);
    ended_.wait();
  }

  /// Whether it has.
  [[nodiscard]] bool is_idle() {
    const DeviceScope scope(device_);
    return ended_.has_passed();
  }

 private:
  int device_ = 0;
  Event ended_;
  Event fork_;
  unsigned long long last_ = 0;
  bool any_ = false;
};

[[nodiscard]] inline bool has_fault(const kernels::Group& group) {
  return __atomic_load_n(&group.fault->pending, __ATOMIC_ACQUIRE) != 0;
}

/// Ranks that low-latency kernels have masked, as bits.
[[nodiscard]] inline uint32_t masked_ranks(const kernels::Group& group) {
  return __atomic_load_n(&group.fault->masked, __ATOMIC_RELAXED);
}

/// The fault that a kernel has recorded. It is cleared, and its notes on the device behind what was launched.
[[nodiscard]] inline std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, Turns& turns,
                                                                    void* stream) {
  if (!has_fault(group)) return std::nullopt;
  const kernels::FaultRecord taken = *group.fault;
  __atomic_store_n(&group.fault->pending, 0u, __ATOMIC_RELEASE);
  turns.take(stream, [&] {
    constexpr size_t kNotes = offsetof(kernels::LocalState, phase);
    kernels::check(cudaMemsetAsync(&group.state->phase, 0, sizeof(kernels::LocalState) - kNotes,
                                   static_cast<cudaStream_t>(stream)),
                   "cudaMemsetAsync");
  });
  return taken;
}

}  // namespace deepep::host
