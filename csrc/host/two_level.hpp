// One rank's view of a group of several domains, and the two-level operations on it. Its launcher is the
// emulator's (emulator/two_level.hpp) or a GPU's (cuda_two_level.hpp).
#pragma once

#include <bit>
#include <utility>

#include "host/launches.hpp"
#include "host/rails.hpp"

namespace deepep::host {

/// Sizes that all ranks share.
struct TwoLevelShape {
  RailPlan plan;
  int max_local_experts = 0;
  int max_blocks = 0;
  int64_t window = 0;     // tokens
  int64_t row_bytes = 0;  // of the longest rows, either way
  int num_scales = 0;     // most
  int num_topk = 0;       // most

  [[nodiscard]] layout::ControlLayout control() const {
    return {plan.place.num_ranks, max_local_experts, max_blocks};
  }
  [[nodiscard]] layout::CrossingRecord<int64_t> record() const {
    return {.row_bytes = row_bytes,
            .num_scales = num_scales,
            .domain_ranks = plan.place.ranks_per_domain,
            .num_topk = num_topk};
  }
  [[nodiscard]] layout::ReturnRecord<int64_t> return_record() const {
    return {.row_bytes = row_bytes, .num_topk = num_topk};
  }
  [[nodiscard]] layout::RailLayout rails() const {
    const layout::MailboxWords words{plan.place.num_ranks};
    return {{.num_domains = plan.max_rails() + 1,
             .window = window,
             .record_bytes = record().bytes(),
             .return_bytes = return_record().bytes(),
             .copies = 1,
             .mailbox_words = words.expert_count(0) + plan.place.ranks_per_domain * max_local_experts}};
  }
  [[nodiscard]] layout::ReturnStaging staging() const {
    return {.num_slots = plan.max_served(),
            .window = window,
            .domain_ranks = plan.place.ranks_per_domain,
            .num_ranks = plan.place.num_ranks,
            .record_bytes = return_record().bytes()};
  }
  /// Places in a rank's queue of puts, a power of two: for all that may be open.
  [[nodiscard]] int64_t num_put_orders() const {
    return static_cast<int64_t>(
        std::bit_ceil(static_cast<uint64_t>(plan.max_rails() * rails().max_open_puts())));
  }
  /// Of the heap that a domain maps, what operations need before the arrays they receive in.
  [[nodiscard]] int64_t heap_bytes() const { return control().bytes() + staging().bytes(); }
};

/// A rank, and its memory.
struct TwoLevelOptions {
  TwoLevelShape shape;
  int rank = 0;
  std::vector<std::byte*> heaps;  // every rank's, as mapped here; null: of another domain
  std::byte* remote = nullptr;    // shape.rails().bytes(), which its NIC knows
  dev::Wire wire;                 // by which it puts
  int32_t* before = nullptr;      // [chunks of the most tokens, R]
  int64_t max_tokens = 0;
  kernels::LocalState* state = nullptr;
  kernels::RailState* rail_state = nullptr;
  kernels::FaultRecord* fault = nullptr;
  double timeout_seconds = 0;
};

template <class L>
class TwoLevelDomain {
 public:
  template <class... OfLauncher>
  explicit TwoLevelDomain(const TwoLevelOptions& given, OfLauncher&&... of_launcher)
      : before_(given.before),
        max_tokens_(given.max_tokens),
        launcher_(std::forward<OfLauncher>(of_launcher)...) {
    const RailPlan& plan = given.shape.plan;
    const int ranks = plan.place.num_ranks;
    if (ranks < 2 || ranks > layout::kMaxGroupRanks || given.heaps.size() != static_cast<size_t>(ranks))
      throw std::invalid_argument("a group of several domains has 2 to 256 ranks");
    if (plan.place.ranks_per_domain > layout::kMaxRanks)
      throw std::invalid_argument("a domain has at most 32 ranks: a warp's lanes handle one each");
    if (plan.place.num_domains() < 2 || plan.place.num_domains() > layout::kMaxDomains)
      throw std::invalid_argument("2 to 30 domains: a warp's lanes hold their sums, and two biases");
    if (given.shape.window <= 0 || given.shape.window % layout::kChunkRecords != 0)
      throw std::invalid_argument("a window has whole chunks of 16 tokens");
    const int domain = plan.place.domain_of_rank(given.rank);
    const int first = plan.place.first_rank_of_domain(domain);
    group_.rank = given.rank - first;
    group_.num_ranks = plan.place.num_ranks_of_domain(domain);
    group_.timeout_ns = static_cast<uint64_t>(given.timeout_seconds * 1e9);
    group_.control = given.shape.control();
    group_.staging_offset = group_.control.bytes();
    for (int local = 0; local < group_.num_ranks; ++local) {
      group_.heap[local] = given.heaps[static_cast<size_t>(first + local)];
      if (plan.is_live(first + local)) group_.live |= 1u << local;
    }
    group_.state = given.state;
    group_.fault = given.fault;
    two_level_.all = {
        .rank = given.rank, .num_ranks = ranks, .first_neighbour = first, .live = plan.live};
    two_level_.rails = plan.rails_of(given.rank);
    two_level_.layout = given.shape.rails();
    two_level_.staging = given.shape.staging();
    two_level_.remote = given.remote;
    two_level_.wire = given.wire;
    two_level_.state = given.rail_state;
  }

  void dispatch(const DispatchLaunch& call) {
    kernels::TwoLevelDispatchArgs args = complete(call.args, call.blocks.total, kernels::DispatchMode::kFresh);
    for (int array = 0; array < layout::kSlotArrays; ++array)
      args.dispatch.slot[array] = offset(call.received[array]);
    launcher_.prefix({.num_ranks = two_level_.all.num_ranks,
                      .num_tokens = args.dispatch.num_tokens,
                      .is_token_in_rank = args.dispatch.is_token_in_rank,
                      .before = before_},
                     call.stream);
    launcher_.dispatch(args, call.blocks.total, call.stream);
  }

  [[nodiscard]] CachedDispatch prepare_cached(const DispatchLaunch& call) const {
    CachedDispatch prepared{.num_blocks = call.blocks.total, .args = call.args};
    prepared.args.index_bytes = 8;
    return prepared;
  }

  void dispatch_cached(const CachedDispatch& prepared, const CachedRows& rows, void* stream) {
    kernels::TwoLevelDispatchArgs args =
        complete(prepared.args, prepared.num_blocks, kernels::DispatchMode::kCached);
    args.dispatch.x = rows.x;
    args.dispatch.scales = rows.scales;
    args.dispatch.slot[layout::kSlotRows] = offset(rows.recv_x);
    args.dispatch.slot[layout::kSlotScales] = offset(rows.recv_scales);
    launcher_.dispatch(args, prepared.num_blocks, stream);
  }

  /// Posts to the others that this rank takes no part in a dispatch: one of no tokens, which none agrees with.
  /// `counts` [R, R]: zeros.
  void refuse_dispatch(int32_t* counts, void* stream) {
    kernels::DispatchArgs args{};
    args.index_bytes = 8;
    args.row_bytes = 16;
    args.counts = counts;
    args.tokens_per_rank = counts;
    launcher_.dispatch(complete(args, 1, kernels::DispatchMode::kRefused), 1, stream);
  }

  /// The same of a combine.
  void refuse_combine(const int32_t* counts, void* stream) {
    kernels::TwoLevelCombineArgs args{.combine = {},
                                      .two_level = two_level_,
                                      .record = {.row_bytes = 16, .num_topk = 0},
                                      .source_token = nullptr};
    args.combine.group = group_;
    args.combine.mode = kernels::CombineMode::kRefused;
    args.combine.row_bytes = 16;
    args.combine.counts = counts;
    launcher_.combine(args, 1, stream);
  }

  void combine(const CombineLaunch& call) {
    if (call.args.slots != nullptr) throw std::invalid_argument("slots: not between domains");
    kernels::TwoLevelCombineArgs args{
        .combine = call.args,
        .two_level = two_level_,
        .record = {.row_bytes = call.args.row_bytes, .num_topk = call.args.num_topk},
        .source_token = call.source_token};
    check_record(args.record.bytes());
    args.combine.group = group_;
    launcher_.combine(args, call.blocks.total, call.stream);
  }

  void layout(const LayoutLaunch& call) { launcher_.layout(call.args, call.num_blocks, call.stream); }

  [[nodiscard]] std::optional<kernels::FaultRecord> take_fault(void* stream) {
    return launcher_.take_fault(group_, stream);
  }
  [[nodiscard]] const kernels::Group& group() const { return group_; }
  [[nodiscard]] L& launcher() { return launcher_; }

 private:
  [[nodiscard]] kernels::TwoLevelDispatchArgs complete(const kernels::DispatchArgs& given, int num_blocks,
                                                       kernels::DispatchMode mode) const {
    if (given.num_tokens > max_tokens_) throw std::invalid_argument("more tokens than there is room to count");
    kernels::TwoLevelDispatchArgs args{.dispatch = given,
                                       .two_level = two_level_,
                                       .record = {.row_bytes = given.row_bytes,
                                                  .num_scales = given.num_scales,
                                                  .domain_ranks = two_level_.staging.domain_ranks,
                                                  .num_topk = given.num_topk},
                                       .before = before_};
    check_record(args.record.bytes());
    args.dispatch.group = group_;
    args.dispatch.mode = mode;
    args.dispatch.push_blocks = num_blocks;
    args.dispatch.local_blocks = num_blocks;
    return args;
  }
  void check_record(int64_t bytes) const {
    if (bytes > two_level_.layout.windows.record_bytes)
      throw std::invalid_argument("rows that are longer than memory was laid out for");
  }
  /// Where in this rank's heap; 0 for nowhere.
  [[nodiscard]] int64_t offset(const std::byte* address) const {
    return address == nullptr ? 0 : address - group_.heap[group_.rank];
  }

  kernels::Group group_{};  // of the ranks of this one's domain
  kernels::TwoLevelArgs two_level_{};
  int32_t* before_;
  int64_t max_tokens_;
  L launcher_;
};

}  // namespace deepep::host
