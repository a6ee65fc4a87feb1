// Ordered accesses: the values a word has had, who may still read which, and what is learned by reading one.
#include <algorithm>
#include <cstring>

#include "emulator/machine/memory.hpp"

namespace deepep::emu {

namespace {

/// Older values than this many are forgotten: as if they had been delivered.
constexpr size_t kMaxMessages = 16;
constexpr size_t kMaxEvents = size_t{1} << 14;

[[nodiscard]] bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }
[[nodiscard]] bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }
[[nodiscard]] size_t index_of(Scope scope) { return static_cast<size_t>(scope); }

}  // namespace

Memory::Memory(const Topology& topology, Environment& environment)
    : clocks(topology.clock_slots()), topology_(topology), environment_(environment) {
  histories_.emplace_back();  // index 0 is none
  pieces_.emplace_back();
  read_sets_.emplace_back();
  copies_.emplace_back();
}

void Memory::log(Event event) {
  event.step = environment_.step();
  if (events_.size() < kMaxEvents)
    events_.push_back(event);
  else
    events_[num_events_ % kMaxEvents] = event;
  ++num_events_;
}

// ---- histories ---------------------------------------------------------------------------------------------

/// The history of the accessed word, begun if need be, with every conflict that its cells show checked.
History& Memory::open_history(Agent& agent, const Access& access, bool is_store) {
  const int num_cells = static_cast<int>(access.bytes / 4);
  bool begin = false;
  for (int i = 0; i < num_cells; ++i) {
    Cell& cell = arena.touched(access.address + 4 * static_cast<uintptr_t>(i));
    if (cell.shape == Cell::Shape::barrier) fail_barrier(agent, access, "there is an mbarrier in use");
    if (cell.shape == Cell::Shape::pieces) unify(agent, cell, access);
    if (cell.shape == Cell::Shape::ordered) {
      History& history = histories_[cell.extra];
      if (history.address == access.address && history.bytes == access.bytes) {
        check_write_known(agent, cell, access);
        if (is_store) check_reads_known(agent, cell, access);
        continue;
      }
      // Ordered accesses of different widths do not order each other: what came before must be known.
      check_messages_known(agent, history, access, true);
      dissolve(history);
    }
    check_write_known(agent, cell, access);
    if (is_store) check_reads_known(agent, cell, access);
    begin = true;
  }
  Cell& first = arena.cell(access.address);
  if (!begin) return histories_[first.extra];

  uint32_t index;
  if (free_histories_.empty()) {
    index = static_cast<uint32_t>(histories_.size());
    histories_.emplace_back();
  } else {
    index = free_histories_.back();
    free_histories_.pop_back();
  }
  History& history = histories_[index];
  history.address = access.address;
  history.bytes = static_cast<int>(access.bytes);
  history.first = 0;
  Message initial;
  std::memcpy(&initial.value, reinterpret_cast<const void*>(access.address), static_cast<size_t>(access.bytes));
  initial.is_plain = true;
  initial.writer = first.write;
  initial.site = first.write_site;
  history.messages.assign(1, initial);
  for (int i = 0; i < num_cells; ++i) {
    Cell& cell = arena.cell(access.address + 4 * static_cast<uintptr_t>(i));
    cell.shape = Cell::Shape::ordered;
    cell.extra = index;
  }
  return history;
}

/// Back to plain memory that holds the newest value: only when whoever asks knows all of the history.
void Memory::dissolve(History& history) {
  const Message& last = history.messages.back();
  const uint32_t index = arena.cell(history.address).extra;
  for (uintptr_t a = history.address; a < history.address + static_cast<uintptr_t>(history.bytes); a += 4) {
    Cell& cell = arena.cell(a);
    cell.shape = Cell::Shape::plain;
    cell.extra = 0;
    cell.write = last.writer;
    cell.write_site = last.site;
  }
  history.messages.clear();
  history.seen.clear();
  history.waiters.clear();
  free_histories_.push_back(index);
}

void Memory::check_messages_known(const Agent& agent, const History& history, const Access& access,
                                  bool readers_too) {
  for (const Message& m : history.messages)
    if (!knows(agent, m.writer)) fail_race(agent, access, "store", m.writer, m.site, nullptr);
  if (!readers_too) return;
  for (const Seen& s : history.seen)
    if (!knows(agent, s.reader)) fail_race(agent, access, "load", s.reader, s.site, nullptr);
}

/// Ordered accesses race as well when neither knows of the other and a scope does not include both.
void Memory::check_strong(const Agent& agent, History& history, Scope scope, const Access& access,
                          bool is_store) {
  const auto check = [&](Epoch other, Scope other_scope, const char* what, uint16_t site) {
    if (knows(agent, other)) return;
    const Scope distance = topology_.distance(agent.slot, other.slot);
    if (scope < distance || other_scope < distance)
      fail_race(agent, access, what, other, site, "their scopes do not include each other");
  };
  for (const Message& m : history.messages)
    if (!m.is_plain) check(m.writer, m.scope, "store", m.site);
  if (!is_store) return;
  for (const Seen& s : history.seen) check(s.reader, s.scope, "load", s.site);
}

/// A load may not return anything older than what is known to have been written or read before it.
uint64_t Memory::oldest_lawful(const Agent& agent, const History& history) const {
  uint64_t oldest = history.first;
  for (uint64_t i = history.latest(); i > oldest; --i) {
    const Message& m = history.messages[i - history.first];
    if (m.delivered_at <= environment_.step() || knows(agent, m.writer)) {
      oldest = i;
      break;
    }
  }
  for (const Seen& s : history.seen)
    if (s.index > oldest && agent.knows(s.reader)) oldest = s.index;
  return oldest;
}

void Memory::note_seen(Agent& agent, History& history, uint64_t index, Scope scope, uint16_t site) {
  for (Seen& s : history.seen) {
    if (s.reader.slot != agent.slot) continue;
    s = {agent.now(), index, scope, site};
    return;
  }
  history.seen.push_back({agent.now(), index, scope, site});
}

// ---- what is released and acquired -------------------------------------------------------------------------

/// What a store in this order publishes: what its own release covers, and what fences before it do.
std::vector<Released> Memory::releases_of(Agent& agent, Order order, Scope scope) {
  std::vector<Released> out;
  for (const Released& fenced : agent.fenced)
    if (fenced.known && !(releases(order) && fenced.scope <= scope)) out.push_back(fenced);
  if (releases(order))
    out.push_back({.scope = scope, .origin = agent.now(), .known = agent.known, .crossed = agent.crossed});
  return out;
}

void Memory::learn(Agent& agent, const Released& released) {
  // Whoever knows that moment of its origin learned it with all the origin knew.
  if (!released.merged && agent.knows(released.origin)) return;
  agent.known.join(released.known);
  agent.known.raise(released.origin);
  agent.crossed.join(released.crossed);
}

/// A load has returned `message`: an acquire learns what was released with it, a relaxed load keeps it for a
/// fence.
void Memory::observe(Agent& agent, const Message& message, Order order, Scope scope) {
  for (const Released& released : message.releases) {
    Scope distance = topology_.distance(agent.slot, released.origin.slot);
    if (released.scope < distance) continue;
    if (released.merged) distance = released.scope;  // the farthest any of its origins can be
    if (acquires(order) && scope >= distance) {
      learn(agent, released);
    } else {
      ClockRef& kept = agent.unacquired[index_of(distance)];
      kept.join(released.known);
      kept.raise(released.origin);
      agent.unacquired_crossed[index_of(distance)].join(released.crossed);
    }
  }
  // A signal comes from another rank, whoever that is.
  if (acquires(order) && scope == Scope::sys)
    for (CopyId id : message.puts) observe_put(agent, id);
  else
    agent.unacquired_puts.insert(agent.unacquired_puts.end(), message.puts.begin(), message.puts.end());
}

void Memory::fence(Agent& agent, Order order, Scope scope, uint16_t site) {
  if (acquires(order)) {
    for (size_t distance = 0; distance <= index_of(scope); ++distance) {
      if (agent.unacquired[distance]) agent.known.join(agent.unacquired[distance]);
      agent.unacquired[distance] = ClockRef();
      agent.crossed.join(agent.unacquired_crossed[distance]);
      agent.unacquired_crossed[distance] = {};
    }
  }
  if (acquires(order) && scope == Scope::sys) {
    for (CopyId id : agent.unacquired_puts) observe_put(agent, id);
    agent.unacquired_puts.clear();
  }
  if (releases(order)) {
    for (size_t narrower = 0; narrower < index_of(scope); ++narrower) agent.fenced[narrower] = {};
    agent.fenced[index_of(scope)] = {.scope = scope,
                                     .origin = agent.now(),
                                     .known = agent.known,
                                     .crossed = agent.crossed};
  }
  log({.kind = Event::Kind::fence, .order = order, .scope = scope, .site = site, .at = agent.now()});
  advance(agent);
}

void Memory::lose_writes(int rank) {
  for (History& history : histories_)
    for (Message& m : history.messages)
      if (!m.is_plain && m.delivered_at > environment_.step() && topology_.rank_of(m.writer.slot) == rank)
        m.delivered_at = kNever;
  for (CopyId id : under_way_)
    if (topology_.rank_of(copies_[id].issuer.slot) == rank) copies_[id].state = Copy::State::lost;
}

void Memory::teach(ClockRef& known, const Agent& agent) const {
  known.join(agent.known);
  known.raise(agent.now());
}

void Memory::synchronize(const std::vector<Agent*>& agents, uint16_t site) {
  // After a barrier all know the same, so there are few different clocks among many agents.
  ClockRef all = agents[0]->known;
  const Clock* last = all.get();
  for (const Agent* agent : agents) {
    if (agent->known.get() == last) continue;
    last = agent->known.get();
    all.join(agent->known);
  }
  for (const Agent* agent : agents) all.raise(agent->now());
  log({.kind = Event::Kind::sync, .order = Order::acq_rel, .scope = Scope::block, .site = site,
       .at = agents[0]->now(), .value = agents.size()});
  Crossed crossed;
  for (const Agent* agent : agents)
    for (size_t space = 0; space < crossed.in.size(); ++space)
      if (agent->crossed.in[space].get() != crossed.in[space].get())
        crossed.in[space].join(agent->crossed.in[space]);
  for (Agent* agent : agents) {
    agent->known = all;
    agent->crossed = crossed;
    advance(*agent);
  }
}

// ---- the accesses ------------------------------------------------------------------------------------------

uint64_t Memory::strong_load(Agent& agent, uintptr_t address, int bytes, Order order, Scope scope,
                             uint16_t site) {
  const Access access{"ordered load", address, bytes, site};
  check_reach(agent, access);
  check_written(agent, access);
  History& history = open_history(agent, access, false);
  check_strong(agent, history, scope, access, false);
  const uint64_t oldest = oldest_lawful(agent, history);
  const auto choices = static_cast<uint32_t>(history.latest() - oldest + 1);
  const uint64_t index = choices == 1 ? oldest : oldest + environment_.choose_value(choices);
  const Message& message = history.messages[index - history.first];
  if (message.is_plain && message.writer.time == 0) fail_unwritten(agent, access);
  observe(agent, message, order, scope);
  note_seen(agent, history, index, scope, access.site);
  log({.kind = Event::Kind::load, .order = order, .scope = scope, .site = access.site, .at = agent.now(),
       .address = address, .value = message.value, .from = message.writer});
  return message.value;
}

void Memory::append(Agent& agent, History& history, Message message, Epoch put) {
  const Slot thread = put.time == 0 ? agent.slot : thread_of(put).slot;
  message.writer = put.time == 0 ? agent.now() : put;
  message.step = environment_.step();
  message.delivered_at = message.step + environment_.delivery_delay(thread);
  std::memcpy(reinterpret_cast<void*>(history.address), &message.value, static_cast<size_t>(history.bytes));
  history.messages.push_back(std::move(message));
  if (history.messages.size() > kMaxMessages) {
    history.messages.erase(history.messages.begin());
    ++history.first;
  }
  for (int i = 0; i < history.bytes; i += 4)
    arena.cell(history.address + static_cast<uintptr_t>(i)).written = 0xf;
  advance(agent);
  environment_.written(history, thread);
}

void Memory::strong_store(Agent& agent, uintptr_t address, int bytes, uint64_t value, Order order, Scope scope,
                          uint16_t site) {
  const Access access{"ordered store", address, bytes, site};
  check_reach(agent, access);
  History& history = open_history(agent, access, true);
  check_strong(agent, history, scope, access, true);
  Message message;
  message.value = value;
  message.scope = scope;
  message.site = access.site;
  message.releases = releases_of(agent, order, scope);
  log({.kind = Event::Kind::store, .order = order, .scope = scope, .site = access.site, .at = agent.now(),
       .address = address, .value = value});
  append(agent, history, std::move(message));
}

uint64_t Memory::strong_rmw(Agent& agent, uintptr_t address, int bytes, Rmw op, uint64_t operand, Order order,
                            Scope scope, uint16_t site) {
  const Access access{"atomic", address, bytes, site};
  check_reach(agent, access);
  check_written(agent, access);
  History& history = open_history(agent, access, true);
  check_strong(agent, history, scope, access, true);
  // An atomic reads the newest value, and hands on what was released with it: a release sequence.
  const Message& read = history.messages.back();
  const uint64_t old = read.value;
  const Epoch from = read.writer;
  Message message;
  message.releases = read.releases;
  message.puts = read.puts;
  observe(agent, read, order, scope);
  note_seen(agent, history, history.latest() + 1, scope, access.site);
  for (Released& mine : releases_of(agent, order, scope)) {
    const auto same = std::find_if(message.releases.begin(), message.releases.end(), [&](const Released& r) {
      if (r.scope != mine.scope) return false;
      return r.scope == Scope::sys || topology_.distance(r.origin.slot, mine.origin.slot) <= r.scope;
    });
    if (same == message.releases.end()) {
      message.releases.push_back(std::move(mine));
      continue;
    }
    same->known.join(mine.known);
    same->known.raise(same->origin);
    same->crossed.join(mine.crossed);
    same->origin = mine.origin;
    same->merged = true;
  }
  const uint64_t sum = op == Rmw::add ? old + operand : old | operand;
  message.value = bytes == 4 ? static_cast<uint32_t>(sum) : sum;
  message.scope = scope;
  message.site = access.site;
  log({.kind = Event::Kind::rmw, .order = order, .scope = scope, .site = access.site, .at = agent.now(),
       .address = address, .value = message.value, .from = from});
  append(agent, history, std::move(message));
  return old;
}

}  // namespace deepep::emu
