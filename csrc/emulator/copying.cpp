// What threads do with bulk copies and mbarriers, and when copies are carried out.
#include <algorithm>

#include "emulator/simulation.hpp"

namespace deepep::emu {

namespace {

[[nodiscard]] uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

void Simulation::bulk_load(void* stage, const void* from, int64_t bytes, void* barrier, Site site) {
  point();
  const CopyId id = memory_.issue(self().agent, true, address_of(stage), address_of(from), bytes, address_of(barrier),
                                  memory_.sites.id(site));
  blocks_[static_cast<size_t>(topology_.block_of(running_))].loads.push_back(id);
  push_wake(step_ + scheduler_.copy_delay(running_ / 32), topology_.copies(), id);
}

void Simulation::bulk_store(void* to, const void* stage, int64_t bytes, Site site) {
  point();
  Fiber& fiber = self();
  const CopyId id =
      memory_.issue(fiber.agent, false, address_of(to), address_of(stage), bytes, 0, memory_.sites.id(site));
  fiber.stores.push_back({id, fiber.groups});
  push_wake(step_ + scheduler_.copy_delay(running_ / 32), topology_.copies(), id);
}

void Simulation::bulk_commit(Site) { ++self().groups; }

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
  fiber.waits_for = Fiber::For::copies;
  fiber.site = memory_.sites.id(site);
  fiber.deadline_ns = kNever;
  while (std::any_of(fiber.stores.begin(), fiber.stores.end(), is_missing)) {
    ++fiber.waits;
    suspend(Fiber::State::waiting);
    ++step_;
  }
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
  if (memory_.copy(id).state == Copy::State::has_read)
    push_wake(step_ + scheduler_.copy_delay(memory_.copy(id).issuer.slot / 32), topology_.copies(), id);
}

void Simulation::check_copies_done() {
  const Fiber& fiber = self();
  if (!fiber.stores.empty()) memory_.fail_outstanding(fiber.agent, fiber.stores.front().id);
  const Block& block = blocks_[static_cast<size_t>(topology_.block_of(running_))];
  if (block.done + 1 < fiber.me.num_threads) return;
  for (CopyId id : block.loads)
    if (memory_.copy(id).seen_by.empty()) memory_.fail_outstanding(fiber.agent, id);
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

bool Simulation::mbarrier_wait(const void* barrier, uint32_t phase, Order order, Scope scope, uint64_t deadline_ns,
                               Site site) {
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
