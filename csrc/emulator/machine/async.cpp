// Bulk copies: what is checked when one is issued, what when it reads and writes, and who knows that it is
// complete.
#include <algorithm>
#include <cstring>

#include "emulator/machine/cells.hpp"

namespace deepep::emu {

namespace {

constexpr int64_t kUnit = 16;
/// Copies that have read a word since it was last written: beyond so many it pays to forget some.
constexpr size_t kManyReaders = 16;

[[nodiscard]] const char* what(Copy::Kind kind, bool writes) {
  switch (kind) {
    case Copy::Kind::load: return writes ? "bulk load's write" : "bulk load's read";
    case Copy::Kind::store: return writes ? "bulk store's write" : "bulk store's read";
    case Copy::Kind::put: return writes ? "put's write" : "put's read";
  }
  return "?";
}

}  // namespace

// ---- who knows what ----------------------------------------------------------------------------------------

bool Memory::has_observer(const std::vector<Epoch>& observers, const ClockRef& known, Epoch self) {
  return std::any_of(observers.begin(), observers.end(), [&](Epoch observer) {
    return observer.slot == self.slot ? observer.time <= self.time : known.knows(observer);
  });
}

bool Memory::knows_otherwise(const Agent& agent, Epoch epoch, bool reading) const {
  const Copy* const as = agent.copy == 0 ? nullptr : &copies_[agent.copy];
  if (epoch.slot == topology_.copies()) {
    const auto id = static_cast<CopyId>(epoch.time);
    const std::vector<Epoch>& observers = reading ? copies_[id].reading_seen_by : copies_[id].seen_by;
    // A put's bytes did not come through the async proxy: a copy of them needs the proxy fence.
    if (as != nullptr && as->kind != Copy::Kind::put && copies_[id].kind == Copy::Kind::put)
      return has_observer(observers, agent.known, agent.now()) ||
             has_observer(observers, as->at_launch, agent.now());
    if (as != nullptr) return has_observer(observers, as->known, as->issuer);
    CopyId& seen = agent.seen_done[id % agent.seen_done.size()];
    if (seen == id) return true;
    const bool found = has_observer(observers, agent.known, agent.now());
    if (found && !reading) seen = id;
    return found;
  }
  // A generic access that no proxy fence has brought before the copy: a kernel's start or end may have.
  if (as == nullptr || as->kind == Copy::Kind::put) return false;
  return as->at_launch.knows(epoch) || (as->known.knows(epoch) && environment_.ended_before(epoch, as->known));
}

void Memory::observe_copy(Agent& agent, CopyId id, bool reads_only) {
  Copy& copy = copies_[id];
  const auto note = [&](std::vector<Epoch>& observers) {
    if (observers.empty() || observers.back().slot != agent.slot) observers.push_back(agent.now());
  };
  note(copy.reading_seen_by);
  if (!reads_only) note(copy.seen_by);
}

void Memory::log_wait(Agent& agent, int pending, bool reads_only, uint16_t site) {
  const uint64_t value = static_cast<uint64_t>(pending) | (reads_only ? uint64_t{1} << 63 : 0);
  log({.kind = Event::Kind::wait_copies, .order = Order::acquire, .scope = Scope::block, .site = site,
       .at = agent.now(), .value = value});
  advance(agent);
}

void Memory::fence_async(Agent& agent, Spaces spaces, uint16_t site) {
  for (size_t space : {Crossed::kShared, Crossed::kGlobal}) {
    if (((static_cast<unsigned>(spaces) >> space) & 1u) == 0) continue;
    agent.crossed.in[space].join(agent.known);
    agent.crossed.in[space].raise(agent.now());
  }
  log({.kind = Event::Kind::proxy_fence, .order = Order::acq_rel, .scope = Scope::block, .site = site,
       .at = agent.now(), .value = static_cast<uint64_t>(spaces)});
  advance(agent);
}

// ---- issue -------------------------------------------------------------------------------------------------

void Memory::check_copy(const Agent& agent, const Access& access, bool in_shared) {
  if (access.bytes <= 0 || access.bytes % kUnit != 0 || access.address % kUnit != 0)
    environment_.fail("misaligned access",
                      described(agent, access) + ": a bulk copy has 16-byte addresses and sizes");
  const Allocation* allocation = arena.find(access.address, static_cast<size_t>(access.bytes));
  if (allocation == nullptr) environment_.fail("out of bounds", described(agent, access));
  if (!is_reachable(agent, *allocation) || (allocation->space == Space::shared) != in_shared)
    environment_.fail("foreign memory", described(agent, access) +
                                            ": a bulk copy is between the block's shared memory and "
                                            "global memory that its thread may touch");
}

CopyId Memory::issue(Agent& agent, Copy::Kind kind, uintptr_t to, uintptr_t from, int64_t bytes,
                     uintptr_t barrier, uint16_t site) {
  const bool is_load = kind == Copy::Kind::load;
  check_copy(agent, {is_load ? "bulk load to" : "bulk store to", to, bytes, site}, is_load);
  check_copy(agent, {is_load ? "bulk load from" : "bulk store from", from, bytes, site}, !is_load);
  Copy copy;
  if (is_load) {
    const Access access{"bulk load's mbarrier", barrier, 8, site};
    Barrier& completes = live_barrier(agent, access);
    // By the letter of later PTX versions a copy completes on its mbarrier in the generic proxy; NVIDIA's own
    // code fences the initialisation, and so do we.
    if (!agent.crossed.in[Crossed::kShared] || !agent.crossed.in[Crossed::kShared].knows(completes.begun))
      fail_race(agent, access, "mbarrier_init", completes.begun, completes.begun_at,
                "no proxy fence lies between the mbarrier's initialisation and its first copy");
    copy.barrier = arena.cell(barrier).extra;
    ++completes.loads_under_way;
  }
  copy.kind = kind;
  copy.site = site;
  copy.to = to;
  copy.from = from;
  copy.bytes = bytes;
  return begin_copy(agent, std::move(copy));
}

CopyId Memory::begin_copy(Agent& agent, Copy copy) {
  const auto id = static_cast<CopyId>(copies_.size());
  log({.kind = Event::Kind::copy, .order = Order::relaxed, .scope = Scope::block, .site = copy.site,
       .at = agent.now(), .address = copy.to, .value = id});
  copy.issuer = agent.now();
  copy.known = agent.known;
  copy.at_launch = agent.at_launch;
  copy.crossed = agent.crossed;
  copies_.push_back(std::move(copy));
  under_way_.push_back(id);
  advance(agent);
  return id;
}

// ---- the copy itself ---------------------------------------------------------------------------------------

Agent Memory::carrier(CopyId id, size_t space) {
  const Copy& copy = copies_[id];
  Agent agent;
  agent.slot = topology_.carrier();
  agent.time = copy.issuer.time;
  agent.copy = id;
  if (copy.kind == Copy::Kind::put) {
    agent.known = copy.known;
    agent.known.raise(copy.issuer);
  } else {
    agent.known = copy.crossed.in[space] ? copy.crossed.in[space] : clocks.zero();
  }
  return agent;
}

void Memory::read_source(Copy& copy, CopyId id) {
  Agent agent = carrier(id, copy.kind == Copy::Kind::load ? Crossed::kGlobal : Crossed::kShared);
  if (copy.kind == Copy::Kind::put) {
    // A NIC is no thread of the block: of others' stores it reads those before a fence of system scope.
    agent.known = copy.released ? copy.released : clocks.zero();
    agent.known.raise(copy.issuer);
  }
  const Access access{what(copy.kind, false), copy.from, copy.bytes, copy.site};
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) {
    if ((cell.written & mask) != mask) fail_unwritten(agent, access);
    check_write_known(agent, cell, access);
    if (cell.shape == Cell::Shape::ordered) check_messages_known(agent, histories_[cell.extra], access, false);
    if (cell.readers == 0) cell.readers = new_read_set();
    std::vector<CopyId>& readers = read_sets_[cell.readers].copies;
    // Whoever knows of a copy of this kernel knows of those waited for before the kernel.
    if (readers.size() >= kManyReaders)
      std::erase_if(readers, [&](CopyId before) {
        return has_observer(copies_[before].reading_seen_by, copy.at_launch, agent.now());
      });
    if (readers.empty() || readers.back() != id) readers.push_back(id);
  });
  const auto* begin = reinterpret_cast<const std::byte*>(copy.from);
  copy.data.assign(begin, begin + copy.bytes);
}

void Memory::write_target(Copy& copy, CopyId id) {
  const Agent agent = carrier(id, copy.kind == Copy::Kind::load ? Crossed::kShared : Crossed::kGlobal);
  const Access access{what(copy.kind, true), copy.to, copy.bytes, copy.site};
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) {
    check_write_known(agent, cell, access);
    check_reads_known(agent, cell, access);
    if (cell.shape == Cell::Shape::ordered) {
      check_messages_known(agent, histories_[cell.extra], access, true);
      dissolve(histories_[cell.extra]);
    }
    drop_readers(cell);
    cell.write = {topology_.copies(), static_cast<Time>(id)};
    cell.write_site = copy.site;
    cell.written |= mask;
  });
  std::memcpy(reinterpret_cast<void*>(copy.to), copy.data.data(), copy.data.size());
}

void Memory::carry_out(CopyId id) {
  Copy& copy = copies_[id];
  if (copy.state == Copy::State::issued) {
    read_source(copy, id);
    copy.state = Copy::State::has_read;
  } else {
    const auto is_under_way = [&](CopyId before) { return copies_[before].state < Copy::State::done; };
    if (std::any_of(copy.behind.begin(), copy.behind.end(), is_under_way)) return environment_.retry(id);
    if (copy.bytes != 0) write_target(copy, id);
    copy.state = Copy::State::done;
    if (copy.kind == Copy::Kind::load) complete_bytes(barriers_[copy.barrier], copy, id);
    if (copy.signal.address != 0) set_signal(copy, id);
    copy.data = {};
    copy.known = copy.at_launch = copy.released = ClockRef();
    copy.crossed = {};
    copy.releases = {};
    std::erase(under_way_, id);
  }
  if (copy.kind != Copy::Kind::load) environment_.wake({copy.issuer.slot});
}

}  // namespace deepep::emu
