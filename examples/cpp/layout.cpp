// Where tokens go, and what a gradient looks like on the wire, without Python or a GPU:
//
//     g++ -std=c++20 -O2 -Iinclude -Icsrc examples/cpp/layout.cpp csrc/layout/rules/*.cpp -o layout
//     echo "2 4 2 6  0 3 1 -1 2 2" | ./layout
//
// Reads routings of one rank, each as K, E, R and the number of entries, then the entries [T, K]. Writes for
// each: tokens per rank, per expert, the row of each token at each rank if all ranks' routings are alike, and
// the FP8 message of the entries as numbers.
#include <cstdio>
#include <iostream>
#include <vector>

#include "deepep/deepep.hpp"

namespace {

template <class T>
void print(const char* name, const std::vector<T>& values) {
  std::cout << name;
  for (const T value : values) std::cout << ' ' << static_cast<int64_t>(value);
  std::cout << '\n';
}

}  // namespace

int main() {
  int64_t num_topk, num_experts, num_ranks, num_entries;
  while (std::cin >> num_topk >> num_experts >> num_ranks >> num_entries) {
    std::vector<int64_t> topk_idx(num_entries);
    for (int64_t& entry : topk_idx) std::cin >> entry;
    const deepep::Group group{
        .num_experts = num_experts, .num_ranks = num_ranks, .ranks_per_domain = num_ranks};
    const auto layout = deepep::dispatch_layout<int64_t>(topk_idx, num_topk, group);
    print("ranks", layout.tokens_per_rank);
    print("experts", layout.tokens_per_expert);

    std::vector<int32_t> counts;  // [R, R]
    for (int64_t rank = 0; rank < num_ranks; ++rank)
      counts.insert(counts.end(), layout.tokens_per_rank.begin(), layout.tokens_per_rank.end());
    const auto received = deepep::received_rows(counts, num_ranks);
    const std::span last = std::span(received.first_rows).last(num_ranks);
    print("rows", deepep::send_rows(layout, last));

    std::vector<float> values;
    for (const int64_t entry : topk_idx) values.push_back(static_cast<float>(entry) / 3);
    print("fp8", deepep::encode_gradients(deepep::GradientFormat::fp8, values));
  }
}
