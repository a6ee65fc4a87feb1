// What the host orders of the copy engine (csrc/kernels/combine/copy_engine.hpp).
#pragma once

#include <cuda.h>

#include "kernels/common/args.hpp"
#include "kernels/common/launch.cuh"

namespace deepep::host {

/// Operations on a word that a stream carries out. Found in the driver that is there, so that nothing is linked
/// to it.
class StreamWords {
 public:
  StreamWords()
      : wait_(find<Operation>("cuStreamWaitValue32")), write_(find<Operation>("cuStreamWriteValue32")) {}
  /// Holds the stream back until the word has reached the value.
  void wait(cudaStream_t stream, const uint32_t* word, uint32_t value) const {
    check_driver(wait_(stream, address(word), value, CU_STREAM_WAIT_VALUE_GEQ), "cuStreamWaitValue32");
  }
  /// Writes it behind a fence: what the stream has done before is visible by then.
  void write(cudaStream_t stream, const uint32_t* word, uint32_t value) const {
    check_driver(write_(stream, address(word), value, CU_STREAM_WRITE_VALUE_DEFAULT), "cuStreamWriteValue32");
  }

 private:
  using Operation = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

  template <class Function>
  static Function find(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    kernels::check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(std::string(name) + ": not in this driver");
    return reinterpret_cast<Function>(entry);
  }
  static CUdeviceptr address(const uint32_t* word) { return reinterpret_cast<CUdeviceptr>(word); }
  static void check_driver(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS)
      throw std::runtime_error(std::string(what) + ": CUresult " + std::to_string(result));
  }

  Operation wait_;
  Operation write_;
};

/// One rank's. Of the device that is current when it is made.
class CopyEngine {
 public:
  CopyEngine() {
    int least = 0, greatest = 0;
    kernels::check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    kernels::check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
                   "cudaStreamCreateWithPriority");
  }
  ~CopyEngine() { (void)cudaStreamDestroy(stream_); }
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  /// Tickets for so many chunks.
  [[nodiscard]] kernels::CopyEngineWork take(const layout::ChunkSizes& chunks) {
    if (chunks.num_chunks > layout::ChunkSizes::kMaxChunks || chunks.shrink < 1 || chunks.shrink > 100)
      throw std::invalid_argument("at most 4 chunks, each 1 to 100 percent of the one before");
    ticket_ += static_cast<uint32_t>(chunks.num_chunks);
    return {chunks, ticket_};
  }

  /// Orders what the combine that was launched just before leaves to the engine. counts [R, R]: the handle's.
  void order(const kernels::CombineArgs& args, const int32_t* counts) {
    const kernels::Group& g = args.group;
    const kernels::CopyEngineWork& work = args.copy_engine;
    const layout::CountMatrix count{counts, g.num_ranks};
    const layout::StagingLayout& staging = args.staging;
    words_.wait(stream_, &g.state->ce_doorbell, work.last_ticket);
    const auto each_owner = [&](int chunk, const layout::ChunkSizes& chunks, const auto& visit) {
      for (int d = 1; d < g.num_ranks; ++d) {
        const int owner = (g.rank + d) % g.num_ranks;
        const layout::RowRange rows = layout::chunk_of_rows(count, owner, g.rank, chunk, chunks);
        if (((g.live >> owner) & 1u) != 0 && rows.rows > 0) visit(g.heap[owner] + g.staging_offset, rows);
      }
    };
    if (args.num_topk > 0)
      each_owner(0, {1, 100}, [&](std::byte* area, const layout::RowRange& rows) {
        copy(area + staging.weights(rows.place), args.topk_weights + rows.row * args.num_topk,
             rows.rows * staging.weight_bytes());
      });
    for (int chunk = 0; chunk < work.chunks.num_chunks; ++chunk) {
      each_owner(chunk, work.chunks, [&](std::byte* area, const layout::RowRange& rows) {
        copy(area + staging.row(rows.place), args.x + rows.row * args.row_bytes, rows.rows * args.row_bytes);
      });
      words_.write(stream_, &g.state->ce_completed,
                   work.last_ticket - static_cast<uint32_t>(work.chunks.num_chunks - 1 - chunk));
    }
  }

  /// Whether all that a rank returns has its place in the owners' staging.
  [[nodiscard]] static bool has_room(const kernels::CombineArgs& args, const int32_t* counts) {
    const kernels::Group& g = args.group;
    const layout::CountMatrix count{counts, g.num_ranks};
    for (int owner = 0; owner < g.num_ranks; ++owner)
      if (owner != g.rank &&
          layout::first_staging_row(count, owner, g.rank) + count(owner, g.rank) > args.staging.capacity())
        return false;
    return true;
  }

  [[nodiscard]] cudaStream_t stream() const { return stream_; }

 private:
  void copy(std::byte* to, const void* from, int64_t bytes) const {
    kernels::check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_),
                   "cudaMemcpyAsync");
  }

  StreamWords words_;
  cudaStream_t stream_{};
  uint32_t ticket_ = 0;
};

}  // namespace deepep::host
