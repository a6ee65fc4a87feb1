// Mbarriers: arrivals and bytes that a phase waits for, and what its completion tells those who wait for it.
#include <cstdlib>

#include "emulator/machine/memory.hpp"

namespace deepep::emu {

namespace {

/// PTX: counts of arrivals and of bytes stay below this.
constexpr int64_t kMaxCount = (int64_t{1} << 20) - 1;

}  // namespace

void Memory::fail_barrier(const Agent& agent, const Access& access, const std::string& why) const {
  environment_.fail("mbarrier misuse", described(agent, access) + ": " + why +
                                           "\n  its latest ordered operations:\n" +
                                           events_of(thread_of(agent).slot, 0, 6, true));
  std::abort();
}

void Memory::init_barrier(Agent& agent, uintptr_t address, uint32_t count, uint16_t site) {
  const Access access{"mbarrier_init", address, 8, site};
  check_reach(agent, access);
  if (arena.find(address, 8)->space != Space::shared) fail_barrier(agent, access, "not in shared memory");
  if (arena.cell(address).shape == Cell::Shape::barrier)
    fail_barrier(agent, access, "initialised again while it is in use: mbarrier_invalidate comes first");
  if (count < 1 || count > kMaxCount) fail_barrier(agent, access, "a count of " + std::to_string(count));
  plain_store(agent, address, 8, site);
  uint32_t index;
  if (free_barriers_.empty()) {
    index = static_cast<uint32_t>(barriers_.size());
    barriers_.emplace_back();
  } else {
    index = free_barriers_.back();
    free_barriers_.pop_back();
  }
  Barrier& barrier = barriers_[index];
  barrier = {};
  barrier.address = address;
  barrier.is_live = true;
  barrier.count = barrier.missing = count;
  barrier.begun = agent.now();
  barrier.begun_at = site;
  barrier.users = clocks.zero();
  for (uintptr_t word : {address, address + 4}) {
    Cell& cell = arena.cell(word);
    cell.shape = Cell::Shape::barrier;
    cell.extra = index;
  }
  advance(agent);
}

/// The mbarrier at the address, for an operation of a thread of its block.
Barrier& Memory::live_barrier(Agent& agent, const Access& access) {
  if (access.address % 8 != 0) environment_.fail("misaligned access", described(agent, access));
  const Allocation* allocation = arena.find(access.address, 8);
  if (allocation == nullptr) environment_.fail("out of bounds", described(agent, access));
  if (!is_reachable(agent, *allocation)) environment_.fail("foreign memory", described(agent, access));
  const Cell& cell = arena.cell(access.address);
  if (cell.shape != Cell::Shape::barrier || barriers_[cell.extra].address != access.address)
    fail_barrier(agent, access, "there is none");
  Barrier& barrier = barriers_[cell.extra];
  if (!agent.knows(barrier.begun))
    fail_race(agent, access, "mbarrier_init", barrier.begun, barrier.begun_at, nullptr);
  barrier.users.raise(agent.now());
  return barrier;
}

void Memory::invalidate_barrier(Agent& agent, uintptr_t address, uint16_t site) {
  const Access access{"mbarrier_invalidate", address, 8, site};
  Barrier& barrier = live_barrier(agent, access);
  if (barrier.loads_under_way != 0 || barrier.bytes != 0 || barrier.missing != barrier.count ||
      !barrier.waiters.empty())
    fail_barrier(agent, access, "a phase is under way");
  for (Slot s = 0; s < clocks.width(); ++s)
    if (!agent.knows({s, barrier.users[s]}))
      fail_race(agent, access, "mbarrier operation", {s, barrier.users[s]}, 0, nullptr);
  free_barriers_.push_back(arena.cell(address).extra);
  barrier = {};
  for (uintptr_t word : {address, address + 4}) {
    Cell& cell = arena.cell(word);
    cell.shape = Cell::Shape::plain;
    cell.extra = 0;
    cell.write = agent.now();
    cell.write_site = site;
    cell.written = 0;
  }
}

void Memory::complete_phase(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.last = std::move(barrier.running);
  barrier.running = {};
  barrier.missing = barrier.count;
  ++barrier.phase;
  environment_.wake(barrier.waiters);
}

void Memory::arrive(Agent& agent, uintptr_t address, int64_t bytes, Order order, Scope scope, uint16_t site) {
  const Access access{bytes == 0 ? "mbarrier_arrive" : "mbarrier_expect", address, 8, site};
  Barrier& barrier = live_barrier(agent, access);
  log({.kind = Event::Kind::arrive, .order = order, .scope = scope, .site = site, .at = agent.now(),
       .address = address, .value = static_cast<uint64_t>(bytes)});
  if (barrier.missing == 0)
    fail_barrier(agent, access, "one arrival more than the " + std::to_string(barrier.count) + " of a phase");
  barrier.bytes += bytes;
  if (bytes > kMaxCount || barrier.bytes > kMaxCount)
    fail_barrier(agent, access, "more bytes expected than it can count");
  if (order == Order::release) {
    teach(barrier.running.released, agent);
    barrier.running.crossed.join(agent.crossed);
  }
  --barrier.missing;
  complete_phase(barrier);
  advance(agent);
}

void Memory::complete_bytes(Barrier& barrier, const Copy& copy, CopyId id) {
  --barrier.loads_under_way;
  barrier.bytes -= copy.bytes;
  if (barrier.bytes < -kMaxCount) {
    const Agent agent = carrier(id, Crossed::kShared);
    fail_barrier(agent, {"bulk load's completion", barrier.address, 8, copy.site},
                 "more bytes than it can count");
  }
  barrier.running.loads.push_back(id);
  complete_phase(barrier);
}

bool Memory::try_phase(Agent& agent, uintptr_t address, uint32_t phase, Order order, Scope scope,
                       uint16_t site) {
  const Access access{"mbarrier_wait", address, 8, site};
  Barrier& barrier = live_barrier(agent, access);
  if (phase == barrier.phase) return false;
  if (phase != barrier.phase - 1)
    fail_barrier(agent, access,
                 "waits for phase " + std::to_string(static_cast<int32_t>(phase)) + " while phase " +
                     std::to_string(barrier.phase) + " is running: the parity would mean another");
  if (order == Order::acquire) {
    if (barrier.last.released) agent.known.join(barrier.last.released);
    agent.crossed.join(barrier.last.crossed);
    for (CopyId id : barrier.last.loads) observe_copy(agent, id, false);
  }
  log({.kind = Event::Kind::wait_phase, .order = order, .scope = scope, .site = site, .at = agent.now(),
       .address = address, .value = phase});
  advance(agent);
  return true;
}

void Memory::renew(uintptr_t begin, size_t bytes) {
  const Allocation* allocation = arena.find(begin, 0);
  for (uintptr_t word = begin; word < allocation->end; word += 4) {
    Cell& cell = arena.cell(word);
    drop_readers(cell);
    if (cell.shape == Cell::Shape::barrier && barriers_[cell.extra].address == word) {
      barriers_[cell.extra] = {};
      free_barriers_.push_back(cell.extra);
    }
  }
  arena.renew(begin, bytes);
}

}  // namespace deepep::emu
