// Launches of a TwoLevelDomain's operations on a GPU, in turns with the rank's other operations, each beside
// the kernel that serves its puts.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "host/put_stream.hpp"
#include "host/turns.hpp"
#include "host/two_level.hpp"
#include "kernels/common/launch.hpp"
#include "kernels/two_level/launch.hpp"
#include "put_server/service.hpp"
#include "virtual_ranks/gathered.hpp"

namespace deepep::host {

/// Of one rank, on the device that is current when it is made, which is that of its turns.
class CudaTwoLevelLauncher {
 public:
  /// serve: null where whoever launches has the puts served. gathered: null but where many virtual ranks are
  /// launched together, by whoever has gathered them.
  CudaTwoLevelLauncher(std::shared_ptr<Turns> turns, put_server::ServePuts serve,
                       const put_server::PutService& service,
                       std::shared_ptr<virtual_ranks::Launches> gathered)
      : turns_(std::move(turns)), serve_(serve), service_(service), gathered_(std::move(gathered)) {
    kernels::load_two_level();
    if (serve_ == nullptr) return;
    int device = 0;
    kernels::check(cudaGetDevice(&device), "cudaGetDevice");
    kernels::check(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, device),
                   "cudaDeviceGetAttribute");
    put_stream_ = std::make_unique<PutStream>();
  }

  void prefix(const kernels::TwoLevelPrefixArgs& args, void* stream) {
    if (gathered_ != nullptr) return gathered_->prefix.add(args, 1);
    in_turn(stream, [&] { kernels::launch_two_level(args, stream); });
  }
  void dispatch(const kernels::TwoLevelDispatchArgs& args, int num_blocks, void* stream) {
    if (gathered_ != nullptr) return gathered_->dispatch.add(args, num_blocks);
    with_puts(args, num_blocks, stream);
  }
  void combine(const kernels::TwoLevelCombineArgs& args, int num_blocks, void* stream) {
    if (gathered_ != nullptr) return gathered_->combine.add(args, num_blocks);
    with_puts(args, num_blocks, stream);
  }
  void layout(const kernels::LayoutArgs& args, int num_blocks, void* stream) {
    in_turn(stream, [&] { kernels::launch_layout(args, num_blocks, stream); });
  }
  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(const kernels::Group& group, void* stream) {
    return host::take_fault(group, *turns_, stream);
  }
  [[nodiscard]] Turns& turns() { return *turns_; }

  /// True once a launch was captured: graphs hold the addresses of this domain's memory.
  [[nodiscard]] bool was_captured() const { return was_captured_; }

 private:
  template <class Args>
  void with_puts(const Args& args, int num_blocks, void* stream) {
    in_turn(stream, [&] {
      if (serve_ == nullptr) return kernels::launch_two_level(args, num_blocks, stream);
      // An SM stays free for who serves: it would wait for these blocks, and they for it.
      put_stream_->beside(
          stream, [&](cudaStream_t beside) { serve_(service_, beside); },
          [&] { kernels::launch_two_level(args, std::min(num_blocks, sms_ - 1), stream); });
    });
  }
  template <class Launch>
  void in_turn(void* stream, const Launch& launch) {
    if (turns_->take(stream, launch)) was_captured_ = true;
  }

  std::shared_ptr<Turns> turns_;
  put_server::ServePuts serve_;
  put_server::PutService service_;
  std::shared_ptr<virtual_ranks::Launches> gathered_;
  std::unique_ptr<PutStream> put_stream_;
  int sms_ = 0;
  bool was_captured_ = false;
};

}  // namespace deepep::host
