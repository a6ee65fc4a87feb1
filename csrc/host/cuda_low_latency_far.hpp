// Launches of the low-latency operations between domains on a GPU, in turns with the rank's other operations;
// those that send, each beside the kernel that serves its puts. A hook's launch has no such kernel.
#pragma once

#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "host/low_latency_far.hpp"
#include "host/put_stream.hpp"
#include "host/turns.hpp"
#include "kernels/low_latency_far/launch.hpp"
#include "kernels/low_latency_rails/launch.hpp"
#include "put_server/service.hpp"

namespace deepep::host {

/// Of one rank, on the device that is current when it is made, which is that of its turns.
class CudaFarLowLatencyLauncher {
 public:
  /// serve: null where whoever launches has the puts served.
  CudaFarLowLatencyLauncher(std::shared_ptr<Turns> turns, put_server::ServePuts serve,
                            const put_server::PutService& service)
      : turns_(std::move(turns)),
        serve_(serve),
        service_(service),
        block_size_(kernels::load_far_low_latency()) {
    kernels::load_low_latency_rails();
    if (serve_ == nullptr) return;
    int device = 0;
    kernels::check(cudaGetDevice(&device), "cudaGetDevice");
    kernels::check(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, device),
                   "cudaDeviceGetAttribute");
    put_stream_ = std::make_unique<PutStream>();
  }

  [[nodiscard]] const kernels::BlockSize& block_size() const { return block_size_; }

  template <class Args>
  void start(const Args& args, int num_blocks, Halves halves, void* stream) {
    const bool serves = serve_ != nullptr && halves != Halves::kReceive;
    if (serves && num_blocks >= sms_)
      throw std::invalid_argument("low latency between domains: an SM stays free for who serves puts");
    const auto launch = [&] { kernels::launch_low_latency(args, num_blocks, halves, stream); };
    const auto with_puts = [&] {
      if (!serves) return launch();
      put_stream_->beside(stream, [&](cudaStream_t beside) { serve_(service_, beside); }, launch);
    };
    if (turns_->take(stream, with_puts)) was_captured_ = true;
  }

  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream) {
    return host::take_fault(group, *turns_, stream);
  }
  [[nodiscard]] Turns& turns() { return *turns_; }
  /// True once a launch was captured: graphs hold the addresses of this domain's memory.
  [[nodiscard]] bool was_captured() const { return was_captured_; }

 private:
  std::shared_ptr<Turns> turns_;
  put_server::ServePuts serve_;
  put_server::PutService service_;
  kernels::BlockSize block_size_;
  std::unique_ptr<PutStream> put_stream_;
  int sms_ = 0;
  bool was_captured_ = false;
};

}  // namespace deepep::host
