// What threads do with bulk copies, mbarriers and puts, and when copies are carried out.
#include <algorithm>

#include "emulator/run/simulation.hpp"

namespace deepep::emu {

namespace {

[[nodiscard]] uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

/// The copy may be carried out before its thread's next step, or long after.
void Simulation::begin(CopyId id) {
  push_wake(step_ + scheduler_.copy_delay(running_ / 32), topology_.copies(), id);
  point();
}

void Simulation::bulk_load(void* stage, const void* from, int64_t bytes, void* barrier, Site site) {
  point();
  const CopyId id = memory_.issue(self().agent, Copy::Kind::load, address_of(stage), address_of(from), bytes,
                                  address_of(barrier), memory_.sites.id(site));
  blocks_[static_cast<size_t>(topology_.block_of(running_))].loads.push_back(id);
  begin(id);
}

void Simulation::bulk_store(void* to, const void* stage, int64_t bytes, Site site) {
  point();
  Fiber& fiber = self();
  const CopyId id = memory_.issue(fiber.agent, Copy::Kind::store, address_of(to), address_of(stage), bytes, 0,
                                  memory_.sites.id(site));
  fiber.stores.push_back({id, fiber.groups});
  begin(id);
}

void Simulation::bulk_commit(Site) { ++self().groups; }

template <class IsMissing>
void Simulation::wait_for_copies(const IsMissing& is_missing, uint16_t site) {
  Fiber& fiber = self();
  fiber.waits_for = Fiber::For::copies;
  fiber.site = site;
  fiber.deadline_ns = kNever;
  while (is_missing()) {
    ++fiber.waits;
    suspend(Fiber::State::waiting);
    ++step_;
  }
}

void Simulation::bulk_wait(int pending, bool reads_only, Site site) {
  point();
  Fiber& fiber = self();
  const Copy::State wanted = reads_only ? Copy::State::has_read : Copy::State::done;
  const auto is_meant = [&](const Fiber::Store& store) {
    return static_cast<int64_t>(store.group) < static_cast<int64_t>(fiber.groups) - pending;
  };
  const auto is_missing = [&](const Fiber::Store& store) {
    const Copy::State state = memory_.copy(store.id).state;
    return is_meant(store) && (state < wanted || state == Copy::State::lost);
  };
  wait_for_copies([&] { return std::any_of(fiber.stores.begin(), fiber.stores.end(), is_missing); },
                  memory_.sites.id(site));
  for (const Fiber::Store& store : fiber.stores)
    if (is_meant(store)) memory_.observe_copy(fiber.agent, store.id, reads_only);
  if (!reads_only) std::erase_if(fiber.stores, is_meant);
  memory_.log_wait(fiber.agent, pending, reads_only, fiber.site);
}

void Simulation::fence_async(Spaces spaces, Site site) {
  point();
  memory_.fence_async(self().agent, spaces, memory_.sites.id(site));
}

void Simulation::carry_out(CopyId id) {
  if (memory_.copy(id).state == Copy::State::lost) return;
  const Copy::State before = memory_.copy(id).state;
  is_carrying_ = true;
  try {
    memory_.carry_out(id);
  } catch (const Abort&) {
    is_carrying_ = false;
    if (in_fiber_) throw;
    return;
  }
  is_carrying_ = false;
  idle_polls_ = 0;
  const Copy& copy = memory_.copy(id);
  if (copy.kind == Copy::Kind::put) {
    Rank& issuer = ranks_[static_cast<size_t>(topology_.rank_of(copy.issuer.slot))];
    if (copy.state == Copy::State::done) --issuer.open_puts[static_cast<size_t>(copy.rank)];
    wake(issuer.quieting);
  }
  if (before == Copy::State::issued)
    push_wake(step_ + scheduler_.copy_delay(copy.issuer.slot / 32), topology_.copies(), id);
}

void Simulation::check_copies_done() {
  const Fiber& fiber = self();
  if (!fiber.stores.empty()) memory_.fail_outstanding(fiber.agent, fiber.stores.front().id);
  const Block& block = blocks_[static_cast<size_t>(topology_.block_of(running_))];
  if (block.done + 1 < fiber.me.num_threads) return;
  for (CopyId id : block.loads)
    if (memory_.copy(id).seen_by.empty()) memory_.fail_outstanding(fiber.agent, id);
}

// ---- puts --------------------------------------------------------------------------------------------------

void Simulation::put(void* to, const void* from, int64_t bytes, void* signal, uint64_t value, bool adds,
                     int rank, Site site) {
  point();
  const uint16_t id = memory_.sites.id(site);
  if (bytes <= 0) fail("empty put", name_of(self().agent.now()) + ": " + memory_.sites.name(id));
  begin_put(address_of(to), address_of(from), bytes,
            {.address = address_of(signal), .value = value, .adds = adds}, rank, id);
}

void Simulation::signal(void* signal, uint64_t value, bool adds, int rank, Site site) {
  point();
  begin_put(0, 0, 0, {.address = address_of(signal), .value = value, .adds = adds}, rank,
            memory_.sites.id(site));
}

void Simulation::begin_put(uintptr_t to, uintptr_t from, int64_t bytes, Signal signal, int rank,
                           uint16_t site) {
  Fiber& fiber = self();
  Rank& issuer = ranks_[static_cast<size_t>(topology_.rank_of(running_))];
  if (rank < 0 || rank >= shape_.num_ranks) fail("foreign memory", "a put to rank " + std::to_string(rank));
  if (fiber.puts.empty()) fiber.puts.resize(static_cast<size_t>(shape_.num_ranks));
  if (issuer.open_puts.empty()) {
    issuer.open_puts.resize(static_cast<size_t>(shape_.num_ranks));
    issuer.put_bytes.resize(static_cast<size_t>(shape_.num_ranks));
  }
  int& open = issuer.open_puts[static_cast<size_t>(rank)];
  if (shape_.max_open_puts > 0 && open >= shape_.max_open_puts)
    fail("too many open puts", name_of(fiber.agent.now()) + ": " + std::to_string(open) + " to rank " +
                                   std::to_string(rank) + " are not delivered, and one more is issued at " +
                                   memory_.sites.name(site));
  ++open;
  issuer.put_bytes[static_cast<size_t>(rank)] += bytes;
  signal.carries = signal.adds || !shape_.weak_signals;
  Fiber::Puts& puts = fiber.puts[static_cast<size_t>(rank)];
  const CopyId id = memory_.issue_put(fiber.agent, to, from, bytes, signal, rank, puts.before, site);
  puts.latest.push_back(id);
  issuer.puts.push_back(id);
  begin(id);
}

int64_t Simulation::put_bytes(int rank, int to) const {
  const std::vector<int64_t>& bytes = ranks_.at(static_cast<size_t>(rank)).put_bytes;
  return bytes.empty() ? 0 : bytes.at(static_cast<size_t>(to));
}

void Simulation::put_fence(Site site) {
  point();
  Fiber& fiber = self();
  for (Fiber::Puts& puts : fiber.puts) {
    if (puts.latest.empty()) continue;
    puts.before = std::move(puts.latest);  // these are behind what was there before, in their turn
    puts.latest.clear();
  }
  memory_.log_put_order(fiber.agent, false, memory_.sites.id(site));
}

void Simulation::put_quiet(Site site) {
  point();
  Fiber& fiber = self();
  std::vector<CopyId>& all = ranks_[static_cast<size_t>(topology_.rank_of(running_))].puts;
  std::vector<CopyId> mine;
  for (CopyId id : all)
    if (memory_.knows_issue(fiber.agent, id)) mine.push_back(id);
  const auto is_missing = [&](CopyId id) { return memory_.copy(id).state != Copy::State::done; };
  std::vector<Slot>& quieting = ranks_[static_cast<size_t>(topology_.rank_of(running_))].quieting;
  quieting.push_back(running_);
  wait_for_copies([&] { return std::any_of(mine.begin(), mine.end(), is_missing); }, memory_.sites.id(site));
  std::erase(quieting, fiber.agent.slot);
  for (CopyId id : mine) {
    memory_.observe_copy(fiber.agent, id, false);
    std::erase(all, id);
  }
  // Whatever it puts from here on, to whomever, is behind them.
  fiber.puts.resize(static_cast<size_t>(shape_.num_ranks));
  for (Fiber::Puts& puts : fiber.puts) {
    puts.before.insert(puts.before.end(), mine.begin(), mine.end());
    puts.latest.clear();
  }
  memory_.log_put_order(fiber.agent, true, memory_.sites.id(site));
}

void Simulation::retry(CopyId put) {
  push_wake(step_ + 1 + scheduler_.copy_delay(memory_.copy(put).issuer.slot / 32), topology_.copies(), put);
}

// ---- mbarriers ---------------------------------------------------------------------------------------------

void Simulation::mbarrier_init(void* barrier, uint32_t count, Site site) {
  point();
  memory_.init_barrier(self().agent, address_of(barrier), count, memory_.sites.id(site));
}

void Simulation::mbarrier_invalidate(void* barrier, Site site) {
  point();
  memory_.invalidate_barrier(self().agent, address_of(barrier), memory_.sites.id(site));
}

void Simulation::mbarrier_arrive(void* barrier, int64_t bytes, Order order, Scope scope, Site site) {
  point();
  idle_polls_ = 0;
  memory_.arrive(self().agent, address_of(barrier), bytes, order, scope, memory_.sites.id(site));
}

bool Simulation::mbarrier_wait(const void* barrier, uint32_t phase, Order order, Scope scope,
                               uint64_t deadline_ns, Site site) {
  const Slot slot = running_;
  Fiber& fiber = self();
  fiber.waits_for = Fiber::For::phase;
  fiber.phase = phase;
  fiber.address = address_of(barrier);
  fiber.site = memory_.sites.id(site);
  fiber.deadline_ns = deadline_ns;
  ++idle_polls_;
  point();
  for (;;) {
    if (memory_.try_phase(fiber.agent, fiber.address, phase, order, scope, fiber.site)) return true;
    if (now_ns() > fiber.deadline_ns) return false;
    ++fiber.waits;
    memory_.barrier_at(fiber.address).waiters.push_back(slot);
    suspend(Fiber::State::waiting);
    std::erase(memory_.barrier_at(fiber.address).waiters, slot);
    ++step_;
  }
}

}  // namespace deepep::emu
