// For the CPU alone: the rules over whole arrays.
#include "layout/rules/layout.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "layout/counts.hpp"
#include "layout/rows.hpp"
#include "layout/rules/check.hpp"
#include "layout/rules/expanded.hpp"
#include "layout/rules/low_latency.hpp"
#include "layout/rules/two_level.hpp"

namespace deepep::host {

namespace {

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();

layout::Placement placement(const Group& group) {
  expect(group.num_ranks > 0 && group.num_ranks <= kInt32, "num_ranks", group.num_ranks, "1 or more");
  expect(group.ranks_per_domain > 0 && group.ranks_per_domain <= kInt32, "ranks_per_node",
         group.ranks_per_domain, "1 or more");
  const int64_t experts = group.num_experts;
  expect(experts > 0 && experts <= kInt32 && experts % group.num_ranks == 0, "num_experts", experts,
         "a multiple of num_ranks = " + std::to_string(group.num_ranks));
  return layout::Placement(int32_t(experts), int32_t(group.num_ranks), int32_t(group.ranks_per_domain));
}

/// Entries are -1 or an expert; anything else is named with its place. No more of them than counts can hold.
template <class Index>
void expect_experts(const char* name, Matrix<const Index> entries, int64_t num_experts) {
  if (entries.rows * entries.cols > kInt32) {
    throw std::overflow_error(std::string(name) + ": more entries than 32 bits count");
  }
  for (int64_t i = 0; i < entries.rows * entries.cols; ++i) {
    const int64_t entry = entries.data[i];
    if (entry >= -1 && entry < num_experts) continue;
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(entry) + " at [" +
                                std::to_string(i / entries.cols) + ", " + std::to_string(i % entries.cols) +
                                "]; expected -1 or 0 .. " + std::to_string(num_experts - 1));
  }
}

void expect_counts(const char* name, Matrix<const int32_t> counts) {
  for (int64_t i = 0; i < counts.rows * counts.cols; ++i) expect_at_least(0, name, counts.data[i]);
}

/// Runs `count(begin, end, counts)` for every part, prefixes the counts over the parts on top of `start`, and
/// runs `number(begin, end, next)` for every part. Returns where a further part would begin.
template <class CountRange, class NumberRange>
std::vector<int64_t> count_then_number(int64_t num_tokens, int64_t num_parts, std::vector<int64_t> start,
                                       const CountRange& count, const NumberRange& number) {
  expect_at_least(1, "num_parts", num_parts);
  const int64_t width = int64_t(start.size());
  const layout::TokenSplit split{num_tokens, num_parts};
  std::vector<int64_t> next(size_t(num_parts * width), 0);             // [parts, width]
  for (int64_t part = 0; num_parts > 1 && part < num_parts; ++part) {  // a single part begins at `start`
    count(split.begin(part), split.end(part), next.data() + part * width);
  }
  for (int64_t i = 0; i < width; ++i) {
    layout::exclusive_prefix(next.data() + i, num_parts, width);
    for (int64_t part = 0; part < num_parts; ++part) next[size_t(part * width + i)] += start[size_t(i)];
  }
  for (int64_t part = 0; part < num_parts; ++part) {
    number(split.begin(part), split.end(part), next.data() + part * width);
  }
  return {next.end() - width, next.end()};
}

}  // namespace

int64_t num_domains(const Group& group) { return placement(group).num_domains(); }

// ---- high throughput

template <class Index>
void dispatch_layout(Matrix<const Index> topk_idx, const Group& group, int32_t* per_rank, int32_t* per_domain,
                     int32_t* per_expert, uint8_t* is_token_in_rank) {
  const layout::Placement place = placement(group);
  expect_experts("topk_idx", topk_idx, group.num_experts);
  std::fill_n(per_rank, place.num_ranks, 0);
  std::fill_n(per_domain, place.num_domains(), 0);
  std::fill_n(per_expert, place.num_experts, 0);
  layout::count_topk(topk_idx.data, int(topk_idx.cols), 0, topk_idx.rows, place,
                     {per_rank, per_domain, per_expert, is_token_in_rank});
}

template <class Index>
void rank_masks(Matrix<const Index> topk_idx, const Group& group, uint64_t* masks) {
  const layout::Placement place = placement(group);
  expect(place.num_ranks <= 64, "num_ranks", place.num_ranks, "at most the 64 bits of a mask");
  expect_experts("topk_idx", topk_idx, group.num_experts);
  for (int64_t token = 0; token < topk_idx.rows; ++token) {
    masks[token] = layout::rank_mask(topk_idx.data + token * topk_idx.cols, int(topk_idx.cols), place);
  }
}

template <class Index>
void local_topk(Matrix<const Index> topk_idx, const Group& group, int64_t rank, Index* local) {
  const layout::Placement place = placement(group);
  expect_index("rank", rank, group.num_ranks);
  expect_experts("topk_idx", topk_idx, group.num_experts);
  for (int64_t i = 0; i < topk_idx.rows * topk_idx.cols; ++i) {
    local[i] = place.local_expert(topk_idx.data[i], int32_t(rank));
  }
}

void first_rows(Matrix<const int32_t> counts, int64_t* rows, int64_t* num_received) {
  expect_counts("counts", counts);
  const layout::CountMatrix count{counts.data, counts.cols};
  for (int64_t rank = 0; rank < counts.cols; ++rank) {
    for (int64_t source = 0; source < counts.rows; ++source) {
      rows[source * counts.cols + rank] = layout::first_row_of_source(count, source, rank);
    }
    num_received[rank] = layout::first_row_of_source(count, counts.rows, rank);
  }
}

void send_rows(Matrix<const uint8_t> is_token_in_rank, const int64_t* first_rows, int64_t num_parts,
               int64_t* rows) {
  const uint8_t* in_rank = is_token_in_rank.data;
  const int64_t num_ranks = is_token_in_rank.cols;
  count_then_number(
      is_token_in_rank.rows, num_parts, std::vector(first_rows, first_rows + num_ranks),
      [&](int64_t begin, int64_t end, int64_t* counts) {
        for (int64_t rank = 0; rank < num_ranks; ++rank) {
          counts[rank] = layout::count_sent(in_rank, num_ranks, int32_t(rank), begin, end);
        }
      },
      [&](int64_t begin, int64_t end, int64_t* next) {
        layout::fill_send_rows(in_rank, num_ranks, begin, end, next, rows);
      });
}

int64_t count_sent(Matrix<const uint8_t> is_token_in_rank, int64_t rank) {
  expect_index("rank", rank, is_token_in_rank.cols);
  return layout::count_sent(is_token_in_rank.data, is_token_in_rank.cols, int32_t(rank), 0,
                            is_token_in_rank.rows);
}

void mark_rows(Matrix<const uint8_t> is_token_in_rank, int64_t source, int64_t rank, int64_t first_row,
               int32_t* src_rank, int32_t* src_token) {
  for (int64_t token = 0; token < is_token_in_rank.rows; ++token) {
    const bool is_sent = is_token_in_rank.data[token * is_token_in_rank.cols + rank] != 0;
    const int64_t row = layout::take_next(is_sent, first_row);
    if (row < 0) continue;
    src_rank[row] = int32_t(source);
    src_token[row] = int32_t(token);
  }
}

void sources_of_rows(const int64_t* first_rows, int64_t num_ranks, int64_t num_rows, int32_t* sources) {
  expect_at_least(1, "num_ranks", num_ranks);
  for (int64_t row = 0; row < num_rows; ++row) {
    sources[row] = layout::source_of_row(first_rows, int32_t(num_ranks), row);
  }
}

template <class Index>
int64_t expanded_layout(Matrix<const Index> recv_topk_idx, int64_t num_local_experts, int64_t alignment,
                        int64_t num_parts, int64_t* begins, int64_t* ends, int64_t* rows) {
  expect_at_least(1, "alignment", alignment);
  expect_experts("recv_topk_idx", recv_topk_idx, num_local_experts);
  const Index* idx = recv_topk_idx.data;
  const int64_t num_topk = recv_topk_idx.cols;
  std::vector<int64_t> counts(size_t(num_local_experts), 0);
  layout::count_expanded(idx, num_topk, 0, recv_topk_idx.rows, counts.data());
  const int64_t total = layout::expanded_begins(counts.data(), num_local_experts, alignment, begins);
  const auto last = count_then_number(
      recv_topk_idx.rows, num_parts, std::vector(begins, begins + num_local_experts),
      [&](int64_t begin, int64_t end, int64_t* part) {
        layout::count_expanded(idx, num_topk, begin, end, part);
      },
      [&](int64_t begin, int64_t end, int64_t* next) {
        layout::fill_expanded_rows(idx, num_topk, begin, end, next, rows);
      });
  std::copy(last.begin(), last.end(), ends);
  return total;
}

// ---- low latency

template <class Index>
void low_latency_counts(Matrix<const Index> topk_idx, const Group& group, int32_t* rows_per_expert) {
  const layout::Placement place = placement(group);
  expect_experts("topk_idx", topk_idx, group.num_experts);
  std::vector<int64_t> counts(size_t(place.num_experts), 0);
  layout::count_expert_rows(topk_idx.data, int(topk_idx.cols), 0, topk_idx.rows, place, counts.data());
  std::copy(counts.begin(), counts.end(), rows_per_expert);
}

void low_latency_ranges(Matrix<const int32_t> rows_per_expert, int64_t rank, int64_t* ranges,
                        int32_t* recv_count) {
  const int64_t num_ranks = rows_per_expert.rows;
  const layout::Placement place = placement({rows_per_expert.cols, num_ranks, num_ranks});
  expect_index("rank", rank, num_ranks);
  expect_counts("rows_per_expert", rows_per_expert);
  for (int32_t local = 0; local < place.experts_per_rank; ++local) {
    const int32_t* rows_from = rows_per_expert.data + place.first_expert_of_rank(int32_t(rank)) + local;
    const int64_t rows =
        layout::fill_ranges(rows_from, num_ranks, place.num_experts, ranges + local * num_ranks);
    if (rows > kInt32) throw std::overflow_error("rows_per_expert: more rows than 32 bits count at one expert");
    recv_count[local] = int32_t(rows);
  }
}

template <class Index>
void low_latency_send_rows(Matrix<const Index> topk_idx, Matrix<const int32_t> rows_per_expert, int64_t source,
                           int64_t num_max_tokens, int64_t num_parts, int64_t* rows) {
  const int64_t num_ranks = rows_per_expert.rows;
  const layout::Placement place = placement({rows_per_expert.cols, num_ranks, num_ranks});
  expect_index("source", source, num_ranks);
  expect_counts("rows_per_expert", rows_per_expert);
  expect(topk_idx.rows <= num_max_tokens, "num_max_tokens", num_max_tokens,
         "at least the " + std::to_string(topk_idx.rows) + " tokens of topk_idx");
  expect_experts("topk_idx", topk_idx, place.num_experts);
  const Index* idx = topk_idx.data;
  const int num_topk = int(topk_idx.cols);
  const layout::CountMatrix count{rows_per_expert.data, place.num_experts};
  std::vector<int64_t> first_row(size_t(place.num_experts));  // of the source, among each expert's rows
  for (int64_t expert = 0; expert < place.num_experts; ++expert) {
    first_row[size_t(expert)] = layout::first_row_of_source(count, source, expert);
  }
  count_then_number(
      topk_idx.rows, num_parts, first_row,
      [&](int64_t begin, int64_t end, int64_t* part) {
        layout::count_expert_rows(idx, num_topk, begin, end, place, part);
      },
      [&](int64_t begin, int64_t end, int64_t* next) {
        layout::fill_expert_rows(idx, num_topk, begin, end, place, next, rows);
      });
  for (int64_t i = 0; i < topk_idx.rows * num_topk; ++i) {
    if (!place.is_expert(idx[i])) continue;
    const int32_t local = place.local_expert(idx[i], place.rank_of_expert(int32_t(idx[i])));
    rows[i] = layout::packed_row(num_ranks, num_max_tokens, local, rows[i]);
  }
}

// ---- two levels

int64_t forwarding_rank(const Group& group, int64_t source, int64_t domain) {
  const layout::Placement place = placement(group);
  expect_index("source", source, place.num_ranks);
  expect_index("node", domain, place.num_domains());
  return layout::forwarding_rank(int32_t(source), int32_t(domain), place);
}

int64_t living_gateway(const Group& group, int64_t source, int64_t domain, const uint8_t* alive) {
  const layout::Placement place = placement(group);
  expect_index("source", source, place.num_ranks);
  expect_index("node", domain, place.num_domains());
  return layout::living_gateway(int32_t(source), int32_t(domain), place,
                                [&](int32_t rank) { return alive[rank] != 0; });
}

void domain_positions(Matrix<const uint8_t> is_token_in_rank, const Group& group, int64_t num_parts,
                      uint64_t* masks, int32_t* position, int32_t* counts) {
  const layout::Placement place = placement(group);
  expect(place.num_ranks_of_domain(0) <= 64, "ranks_per_node", place.ranks_per_domain, "at most 64");
  const uint8_t* in_rank = is_token_in_rank.data;
  const auto last = count_then_number(
      is_token_in_rank.rows, num_parts, std::vector<int64_t>(size_t(place.num_domains()), 0),
      [&](int64_t begin, int64_t end, int64_t* part) {
        for (int32_t domain = 0; domain < place.num_domains(); ++domain) {
          part[domain] = layout::count_sent_to_domain(in_rank, domain, begin, end, place);
        }
      },
      [&](int64_t begin, int64_t end, int64_t* next) {
        layout::fill_domain_positions(in_rank, begin, end, place, next, masks, position);
      });
  std::copy(last.begin(), last.end(), counts);
}

void forwarded_rows(const uint64_t* masks, int64_t num_forwarded, const int64_t* first_rows,
                    int64_t domain_ranks, int64_t* rows) {
  expect(domain_ranks <= 64, "first_rows", domain_ranks, "at most 64 ranks of a domain");
  std::vector<int64_t> next(first_rows, first_rows + domain_ranks);
  layout::fill_forwarded_rows(masks, num_forwarded, int32_t(domain_ranks), next.data(), rows);
}

// ---- the two index types the interface takes

#define DEEPEP_INSTANTIATE(Index)                                                                            \
  template void dispatch_layout(Matrix<const Index>, const Group&, int32_t*, int32_t*, int32_t*, uint8_t*);  \
  template void rank_masks(Matrix<const Index>, const Group&, uint64_t*);                                    \
  template void local_topk(Matrix<const Index>, const Group&, int64_t, Index*);                              \
  template int64_t expanded_layout(Matrix<const Index>, int64_t, int64_t, int64_t, int64_t*, int64_t*,       \
                                   int64_t*);                                                                \
  template void low_latency_counts(Matrix<const Index>, const Group&, int32_t*);                             \
  template void low_latency_send_rows(Matrix<const Index>, Matrix<const int32_t>, int64_t, int64_t, int64_t, \
                                      int64_t*)
DEEPEP_INSTANTIATE(int32_t);
DEEPEP_INSTANTIATE(int64_t);
#undef DEEPEP_INSTANTIATE

}  // namespace deepep::host
