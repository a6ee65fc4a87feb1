// A dispatch between two ranks of one GPU, from C++: rows arrive where the layout rules say. Built by CMake
// with -DDEEPEP_CUDA=ON, or by nvcc (docs/interop.md).
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "deepep/cuda.hpp"
#include "deepep/deepep.hpp"

namespace {

using deepep::cuda::check;
using deepep::cuda::Memory;

constexpr int kRanks = 2, kTokens = 64, kTopk = 2, kExperts = 4, kRowBytes = 512;
constexpr int kBlocks = 4;  // of each rank; all are resident together
constexpr int kCapacity = kRanks * kTokens;

template <class T>
std::unique_ptr<Memory> on_device(const std::vector<T>& values) {
  auto made = std::make_unique<Memory>(values.size() * sizeof(T));
  check(cudaMemcpy(made->as(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return made;
}

/// What a rank sends, and where its kernel leaves what it found out.
struct Sender {
  explicit Sender(int rank) {
    std::vector<int64_t> topk_idx;
    for (int t = 0; t < kTokens; ++t)
      for (int k = 0; k < kTopk; ++k) topk_idx.push_back((t * (rank + 3) + k * 2 + t / 5) % (kExperts + 1) - 1);
    layout = deepep::dispatch_layout<int64_t>(
        topk_idx, kTopk, {.num_experts = kExperts, .num_ranks = kRanks, .ranks_per_domain = kRanks});
    std::vector<int32_t> words;  // every row is its rank and token
    for (int t = 0; t < kTokens; ++t) words.insert(words.end(), kRowBytes / 4, rank * kTokens + t);
    x = on_device(words);
    indices = on_device(topk_idx);
    weights = on_device(std::vector<float>(topk_idx.size(), 0.5f));
    is_token_in_rank = on_device(layout.is_token_in_rank);
    per_rank = on_device(layout.tokens_per_rank);
    per_expert = on_device(layout.tokens_per_expert);
  }

  deepep::DispatchLayout layout;
  std::unique_ptr<Memory> x, indices, weights, is_token_in_rank, per_rank, per_expert;
  Memory counts{kRanks * kRanks * 4}, send_row{kTokens * kRanks * 4};
};

deepep::cuda::DispatchLaunch dispatch_of(const Sender& from, std::byte* receive, cudaStream_t stream) {
  namespace layout = deepep::layout;
  deepep::cuda::DispatchLaunch call;
  call.blocks = {.total = kBlocks, .remote = kBlocks, .local = kBlocks};
  call.args.num_tokens = kTokens;
  call.args.num_topk = kTopk;
  call.args.num_local_experts = kExperts / kRanks;
  call.args.index_bytes = 8;
  call.args.row_bytes = kRowBytes;
  call.args.x = from.x->as();
  call.args.topk_idx = from.indices->as();
  call.args.topk_weights = from.weights->as<uint32_t>();
  call.args.is_token_in_rank = from.is_token_in_rank->as<uint8_t>();
  call.args.tokens_per_rank = from.per_rank->as<int32_t>();
  call.args.tokens_per_expert = from.per_expert->as<int32_t>();
  call.args.counts = from.counts.as<int32_t>();
  call.args.send_row = from.send_row.as<int32_t>();
  call.args.slot_capacity = kCapacity;
  call.received[layout::kSlotRows] = receive;
  call.received[layout::kSlotSource] = receive + kCapacity * kRowBytes;
  call.received[layout::kSlotIndices] = call.received[layout::kSlotSource] + kCapacity * 4;
  call.received[layout::kSlotWeights] = call.received[layout::kSlotIndices] + kCapacity * kTopk * 8;
  call.stream = stream;
  return call;
}

/// Rows of a rank that are not where `send_rows` puts them.
int count_wrong(int rank, const std::vector<std::unique_ptr<Sender>>& senders, const std::byte* receive) {
  std::vector<int32_t> counts;
  for (const auto& sender : senders)
    counts.insert(counts.end(), sender->layout.tokens_per_rank.begin(), sender->layout.tokens_per_rank.end());
  const auto wanted = deepep::received_rows(counts, kRanks);
  std::vector<int32_t> rows(kCapacity * kRowBytes / 4);
  check(cudaMemcpy(rows.data(), receive, rows.size() * 4, cudaMemcpyDeviceToHost));
  int num_wrong = 0;
  for (int source = 0; source < kRanks; ++source) {
    const auto first = std::span(wanted.first_rows).subspan(source * kRanks, kRanks);
    const auto places = deepep::send_rows(senders[source]->layout, first);
    for (int t = 0; t < kTokens; ++t) {
      const int64_t row = places[t * kRanks + rank];
      if (row >= 0) num_wrong += rows[row * (kRowBytes / 4)] != source * kTokens + t;
    }
  }
  std::printf("rank %d received %lld rows, %d of them wrong\n", rank,
              static_cast<long long>(wanted.num_received[rank]), num_wrong);
  return num_wrong;
}

}  // namespace

int main() {
  const deepep::cuda::HeapOptions options{.num_ranks = kRanks,
                                          .max_local_experts = kExperts / kRanks,
                                          .max_blocks = kBlocks,
                                          .staging_bytes = 1 << 20};
  const int64_t heap_bytes = options.receive_offset() + kCapacity * (kRowBytes + 4 + kTopk * 12);
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<std::byte*> heaps;
  for (int rank = 0; rank < kRanks; ++rank) {
    memory.push_back(std::make_unique<Memory>(heap_bytes));
    heaps.push_back(memory.back()->as());
  }
  std::vector<std::unique_ptr<deepep::cuda::Rank>> ranks;
  std::vector<std::unique_ptr<Sender>> senders;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.push_back(std::make_unique<deepep::cuda::Rank>(rank, heaps, options, 5.0));
    senders.push_back(std::make_unique<Sender>(rank));
  }
  check(cudaDeviceSynchronize());
  std::vector<cudaStream_t> streams(kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    check(cudaStreamCreateWithFlags(&streams[rank], cudaStreamNonBlocking));
    std::byte* const receive = heaps[rank] + options.receive_offset();
    ranks[rank]->domain().dispatch(dispatch_of(*senders[rank], receive, streams[rank]));
  }
  check(cudaDeviceSynchronize());
  int num_wrong = 0;
  for (int rank = 0; rank < kRanks; ++rank) {
    if (const auto fault = ranks[rank]->domain().take_fault(streams[rank])) {
      std::printf("rank %d gave up: phase %u, ranks missing as bits %u\n", rank, fault->phase, fault->missing);
      return 1;
    }
    num_wrong += count_wrong(rank, senders, heaps[rank] + options.receive_offset());
  }
  return num_wrong == 0 ? 0 : 1;
}
