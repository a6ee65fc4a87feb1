// Puts to other nodes: where they go, in which order they are delivered, and what their signals tell.
#include <algorithm>
#include <cstring>

#include "emulator/machine/memory.hpp"

namespace deepep::emu {

/// Memory of NICs corresponds by the order in which each rank has allocated it.
uintptr_t Memory::counterpart(const Agent& agent, const Access& access, int rank) {
  const Allocation* own = arena.find(access.address, static_cast<size_t>(access.bytes));
  if (own == nullptr) environment_.fail("out of bounds", described(agent, access));
  if (own->space != Space::remote || own->rank != topology_.rank_of(agent.slot))
    environment_.fail("foreign memory", described(agent, access) +
                                            ": a put is between memory of its own rank's NIC and the "
                                            "same of another's");
  const auto count_before = [&](const Allocation* end) {
    return std::count_if(arena.allocations().data(), end, [&](const Allocation& a) {
      return a.space == Space::remote && a.rank == own->rank;
    });
  };
  auto left = count_before(own);
  for (const Allocation& a : arena.allocations()) {
    if (a.space != Space::remote || a.rank != rank) continue;
    if (left-- != 0) continue;
    if (a.end - a.begin != own->end - own->begin) break;
    return a.begin + (access.address - own->begin);
  }
  environment_.fail("foreign memory",
                    described(agent, access) + ": rank " + std::to_string(rank) + " has no counterpart");
  return 0;
}

CopyId Memory::issue_put(Agent& agent, uintptr_t to, uintptr_t from, int64_t bytes, const Signal& signal,
                         int rank, const std::vector<CopyId>& behind, uint16_t site) {
  Copy copy;
  copy.kind = Copy::Kind::put;
  copy.site = site;
  copy.bytes = bytes;
  copy.rank = rank;
  copy.behind = behind;
  if (bytes > 0) {
    (void)counterpart(agent, {"put from", from, bytes, site}, rank);
    copy.from = from;
    copy.to = counterpart(agent, {"put to", to, bytes, site}, rank);
  }
  if (signal.address != 0) {
    const Access access{"put's signal", signal.address, 8, site};
    if (signal.address % 8 != 0) environment_.fail("misaligned access", described(agent, access));
    copy.signal = signal;
    copy.signal.address = counterpart(agent, access, rank);
    // A relaxed store: it carries what a fence of this thread has released before.
    copy.releases = releases_of(agent, Order::relaxed, Scope::sys);
  }
  copy.released = agent.fenced[static_cast<size_t>(Scope::sys)].known;
  return begin_copy(agent, std::move(copy));
}

void Memory::log_put_order(Agent& agent, bool is_quiet, uint16_t site) {
  log({.kind = Event::Kind::put_order, .order = Order::acq_rel, .scope = Scope::sys, .site = site,
       .at = agent.now(), .value = is_quiet ? uint64_t{1} : 0});
  advance(agent);
}

void Memory::set_signal(const Copy& copy, CopyId id) {
  Agent agent = carrier(id, Crossed::kGlobal);
  const Access access{"put's signal", copy.signal.address, 8, copy.site};
  check_written(agent, access);
  History& history = open_history(agent, access, true);
  check_strong(agent, history, Scope::sys, access, true);
  Message message;
  message.value = copy.signal.value;
  message.releases = copy.releases;
  if (copy.signal.carries) message.puts = {id};
  if (copy.signal.adds) {
    const Message& last = history.messages.back();
    message.value += last.value;
    message.releases.insert(message.releases.end(), last.releases.begin(), last.releases.end());
    message.puts.insert(message.puts.end(), last.puts.begin(), last.puts.end());
  }
  message.scope = Scope::sys;
  message.site = copy.site;
  append(agent, history, std::move(message), {topology_.copies(), static_cast<Time>(id)});
}

void Memory::observe_put(Agent& agent, CopyId id) {
  const std::vector<Epoch>& seen = copies_[id].seen_by;
  const auto is_own = [&](Epoch epoch) { return epoch.slot == agent.slot; };
  if (std::any_of(seen.begin(), seen.end(), is_own)) return;
  observe_copy(agent, id, false);
  for (CopyId before : copies_[id].behind) observe_put(agent, before);
}

}  // namespace deepep::emu
