// What threads do as the machine's: memory operations with their scheduling points, waits, barriers, warp
// collectives.
#include <bit>

#include "emulator/run/simulation.hpp"

namespace deepep::emu {

namespace {

[[nodiscard]] uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

void Simulation::plain_load(const void* p, int bytes, Site site) {
  memory_.plain_load(self().agent, address_of(p), bytes, memory_.sites.id(site));
}
void Simulation::plain_store(void* p, int bytes, Site site) {
  memory_.plain_store(self().agent, address_of(p), bytes, memory_.sites.id(site));
}
void Simulation::load_once(const void* p, int bytes, Site site) {
  memory_.load_once(self().agent, address_of(p), bytes, memory_.sites.id(site));
}
void Simulation::load_guess(const void* p, int bytes, Site site) {
  memory_.load_guess(self().agent, address_of(p), bytes, memory_.sites.id(site));
}

uint64_t Simulation::strong_load(const void* p, int bytes, Order order, Scope scope, Site site) {
  ++idle_polls_;
  point();
  return memory_.strong_load(self().agent, address_of(p), bytes, order, scope, memory_.sites.id(site));
}
void Simulation::strong_store(void* p, int bytes, uint64_t value, Order order, Scope scope, Site site) {
  point();
  memory_.strong_store(self().agent, address_of(p), bytes, value, order, scope, memory_.sites.id(site));
}
uint64_t Simulation::strong_rmw(void* p, int bytes, Rmw op, uint64_t operand, Order order, Scope scope,
                                Site site) {
  point();
  return memory_.strong_rmw(self().agent, address_of(p), bytes, op, operand, order, scope,
                            memory_.sites.id(site));
}
void Simulation::fence(Order order, Scope scope, Site site) {
  point();
  memory_.fence(self().agent, order, scope, memory_.sites.id(site));
}

bool Simulation::wait(const void* p, int bytes, Condition condition, Order order, Scope scope,
                      uint64_t deadline_ns, uint64_t& seen, Site site) {
  return wait_at(address_of(p), bytes, condition, order, scope, deadline_ns, seen, memory_.sites.id(site));
}

bool Simulation::wait_at(uintptr_t address, int bytes, Condition condition, Order order, Scope scope,
                         uint64_t deadline_ns, uint64_t& seen, uint16_t site) {
  const Slot slot = running_;
  Fiber& fiber = fibers_[slot];
  fiber.waits_for = Fiber::For::word;
  fiber.address = address;
  fiber.condition = condition;
  fiber.order = order;
  fiber.scope = scope;
  fiber.site = site;
  fiber.deadline_ns = deadline_ns;
  point();
  for (;;) {
    seen = memory_.strong_load(fiber.agent, fiber.address, bytes, order, scope, site);
    if (condition(seen)) return true;
    if (now_ns() > fiber.deadline_ns) return false;
    History& history = memory_.history_at(fiber.address);
    ++fiber.waits;
    history.waiters.push_back(slot);
    const uint64_t arrival = history.messages.back().delivered_at;
    if (arrival > step_) push_wake(arrival, slot, fiber.waits);
    suspend(Fiber::State::waiting);
    std::erase(memory_.history_at(fiber.address).waiters, slot);
    ++step_;
  }
}

uint64_t Simulation::clock_ns() {
  ++idle_polls_;
  point();
  return now_ns();
}

void Simulation::pause() {
  ++idle_polls_;
  preempted_ = true;
  point();
}

std::byte* Simulation::shared(int64_t byte_offset) {
  const Block& block = blocks_[static_cast<size_t>(topology_.block_of(running_))];
  return reinterpret_cast<std::byte*>(block.shared) + byte_offset;
}

// ---- together ----------------------------------------------------------------------------------------------

void Simulation::fail_divergent(const std::string& what) {
  fail("divergence", name_of(self().agent.now()) + ": " + what + "\n" + story_of_waits());
}

void Simulation::sync_block(Site site) {
  ++step_;
  const uint16_t id = memory_.sites.id(site);
  Fiber& fiber = self();
  Warp& warp = warp_of(running_);
  const int block_index = topology_.block_of(running_);
  Block& block = blocks_[static_cast<size_t>(block_index)];
  if (warp.arrived != 0)
    fail_divergent("at the barrier of " + memory_.sites.name(id) + ", others of its warp are not");
  if (block.done != 0 || warp.done != 0)
    fail_divergent("at the barrier of " + memory_.sites.name(id) + ", others of its block have ended");
  if (block.arrived == 0)
    block.site = id;
  else if (block.site != id)
    fail_divergent("at the barrier of " + memory_.sites.name(id) + ", others of its block at that of " +
                   memory_.sites.name(block.site));
  if (++block.arrived < fiber.me.num_threads) {
    warp.at_barrier |= 1u << (running_ % 32);
    suspend(Fiber::State::barrier);
    return;
  }
  const Slot first = static_cast<Slot>(block_index * shape_.max_threads);
  const Slot end = first + static_cast<Slot>(fiber.me.num_threads);
  agents_.clear();
  for (Slot slot = first; slot < end; ++slot) agents_.push_back(&fibers_[slot].agent);
  memory_.synchronize(agents_, id);
  block.arrived = 0;
  for (Slot slot = first; slot < end; ++slot) {
    if (slot % 32 == 0) warp_of(slot).at_barrier = 0;
    if (slot != running_) make_ready(slot);
  }
  point();
}

/// Lanes gather; the last to come does the collective for all.
void Simulation::arrive(Collective collective, uint64_t value, int source_lane, Site site) {
  ++step_;
  const uint16_t id = memory_.sites.id(site);
  Warp& warp = warp_of(running_);
  const uint32_t lane = running_ % 32;
  if (warp.at_barrier != 0)
    fail_divergent("in the collective of " + memory_.sites.name(id) +
                   ", others of its warp at the block's barrier");
  if (warp.done != 0)
    fail_divergent("in the collective of " + memory_.sites.name(id) + ", others of its warp have ended");
  if (source_lane < 0 || source_lane > 31) fail_divergent("shuffle from lane " + std::to_string(source_lane));
  if (warp.arrived == 0) {
    warp.collective = collective;
    warp.site = id;
  } else if (warp.collective != collective || warp.site != id) {
    fail_divergent("in the collective of " + memory_.sites.name(id) + ", others of its warp in that of " +
                   memory_.sites.name(warp.site));
  }
  warp.values[lane] = value;
  warp.sources[lane] = static_cast<uint8_t>(source_lane);
  warp.arrived |= 1u << lane;
  if (warp.arrived != 0xffffffffu) {
    suspend(Fiber::State::collective);
    return;
  }
  const Slot first = running_ - lane;
  uint64_t sum = 0, any = 0, bits = 0;
  for (uint32_t l = 0; l < 32; ++l) {
    uint64_t& result = fibers_[first + l].result;
    if (collective == Collective::exclusive_sum) result = sum;
    if (collective == Collective::shuffle) result = warp.values[warp.sources[l]];
    sum += warp.values[l];
    any |= warp.values[l];
    bits |= (warp.values[l] & 1u) << l;
  }
  for (uint32_t l = 0; l < 32; ++l) {
    uint64_t& result = fibers_[first + l].result;
    if (collective == Collective::ballot) result = bits;
    if (collective == Collective::sum) result = sum;
    if (collective == Collective::disjunction) result = any;
  }
  // Of the collectives only the barrier orders memory; a ballot or a shuffle does not.
  if (collective == Collective::sync) {
    agents_.clear();
    for (uint32_t l = 0; l < 32; ++l) agents_.push_back(&fibers_[first + l].agent);
    memory_.synchronize(agents_, id);
  }
  warp.arrived = 0;
  for (uint32_t l = 0; l < 32; ++l)
    if (l != lane) make_ready(first + l);
  point();
}

void Simulation::sync_warp(Site site) { arrive(Collective::sync, 0, 0, site); }

uint32_t Simulation::ballot(bool p, Site site) {
  arrive(Collective::ballot, p ? 1 : 0, 0, site);
  return static_cast<uint32_t>(self().result);
}

uint64_t Simulation::shuffle(uint64_t value, int source_lane, Site site) {
  arrive(Collective::shuffle, value, source_lane, site);
  return self().result;
}

int64_t Simulation::warp_sum(int64_t value, Site site) {
  arrive(Collective::sum, static_cast<uint64_t>(value), 0, site);
  return static_cast<int64_t>(self().result);
}

uint32_t Simulation::warp_or(uint32_t value, Site site) {
  arrive(Collective::disjunction, value, 0, site);
  return static_cast<uint32_t>(self().result);
}

int64_t Simulation::warp_exclusive_sum(int64_t value, Site site) {
  arrive(Collective::exclusive_sum, static_cast<uint64_t>(value), 0, site);
  return static_cast<int64_t>(self().result);
}

}  // namespace deepep::emu
