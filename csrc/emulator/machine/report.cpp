// What a failure tells: who did what where, and which ordered operations lay around it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulator/machine/memory.hpp"

namespace deepep::emu {

namespace {

const char* word(Order order) {
  switch (order) {
    case Order::relaxed: return "relaxed";
    case Order::acquire: return "acquire";
    case Order::release: return "release";
    case Order::acq_rel: return "acq_rel";
  }
  return "?";
}

const char* word(Scope scope) {
  switch (scope) {
    case Scope::block: return "block";
    case Scope::gpu: return "gpu";
    case Scope::sys: return "sys";
  }
  return "?";
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), value < 10 ? "%llu" : "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

std::string Memory::place(uintptr_t address) const {
  const Allocation* a = arena.find(address, 1);
  if (a == nullptr) {
    a = arena.nearest(address);
    if (a == nullptr) return "no memory at all";
    const bool before = address < a->begin;
    return hex(before ? a->begin - address : address - a->end) + " bytes " +
           (before ? "before" : "past the end of") + " " + a->name;
  }
  return a->name + "+" + hex(address - a->begin);
}

Epoch Memory::thread_of(Epoch epoch) const {
  return epoch.slot == topology_.copies() ? copies_[static_cast<CopyId>(epoch.time)].issuer : epoch;
}

Epoch Memory::thread_of(const Agent& agent) const {
  return agent.copy == 0 ? agent.now() : copies_[agent.copy].issuer;
}

std::string Memory::described(const Agent& agent, const Access& access) const {
  return environment_.name_of(thread_of(agent)) + ": " + access.what + " of " + std::to_string(access.bytes) +
         " bytes, " + place(access.address) + ", at " + sites.name(access.site);
}

void Memory::check_written(const Agent& agent, const Access& access) {
  for (int64_t i = 0; i < access.bytes; i += 4)
    if (arena.touched(access.address + static_cast<uintptr_t>(i)).written != 0xf) fail_unwritten(agent, access);
}

void Memory::fail_unwritten(const Agent& agent, const Access& access) {
  environment_.fail("read of memory never written", described(agent, access) +
                                                        "\n  its latest ordered operations:\n" +
                                                        events_of(thread_of(agent).slot, 0, 6, true));
  std::abort();  // fail() does not return, but not every compiler believes it of a virtual function
}

std::string Memory::describe(const Event& event) const {
  std::string text = "    step " + std::to_string(event.step) + "  ";
  const std::string how = std::string(word(event.order)) + "." + word(event.scope) + " ";
  switch (event.kind) {
    case Event::Kind::sync:
      return text + "barrier of " + std::to_string(event.value) + " threads at " + sites.name(event.site) +
             "\n";
    case Event::Kind::fence: return text + how + "fence at " + sites.name(event.site) + "\n";
    case Event::Kind::proxy_fence: {
      static const char* const kSpaces[] = {"", "shared", "global", "all"};
      return text + "proxy fence (" + kSpaces[event.value] + ") at " + sites.name(event.site) + "\n";
    }
    case Event::Kind::copy: text += describe_copy(static_cast<CopyId>(event.value)) + ", issued"; break;
    case Event::Kind::wait_copies: {
      const bool reads_only = (event.value >> 63) != 0;
      text += std::string("bulk groups ") + (reads_only ? "have read" : "are complete") + " but for " +
              std::to_string(event.value & 0xffffffffu);
      break;
    }
    case Event::Kind::put_order: text += event.value != 0 ? "quiet" : "fence of puts"; break;
    case Event::Kind::arrive:
      text += how + "arrival at mbarrier " + place(event.address);
      if (event.value != 0) text += ", expecting " + std::to_string(event.value) + " bytes";
      break;
    case Event::Kind::wait_phase:
      text += how + "wait for phase " + std::to_string(static_cast<int32_t>(event.value)) + " of mbarrier " +
              place(event.address);
      break;
    case Event::Kind::store: text += how + "store " + place(event.address) + " = " + hex(event.value); break;
    case Event::Kind::load: text += how + "load " + place(event.address) + " -> " + hex(event.value); break;
    case Event::Kind::rmw: text += how + "atomic " + place(event.address) + " -> " + hex(event.value); break;
  }
  text += " at " + sites.name(event.site);
  if (event.kind != Event::Kind::store && event.from.time != 0)
    text += ", from " + environment_.name_of(thread_of(event.from));
  return text + "\n";
}

std::string Memory::events_of(Slot slot, Time from, size_t count, bool last_ones) const {
  std::vector<const Event*> found;
  const size_t kept = events_.size();
  const size_t oldest = num_events_ > kept ? num_events_ % kept : 0;
  for (size_t i = 0; i < kept; ++i) {
    const Event& event = events_[(oldest + i) % kept];
    const bool is_own = event.at.slot == slot && event.at.time >= from;
    const bool is_barrier = event.kind == Event::Kind::sync && topology_.is_device(slot) &&
                            topology_.distance(event.at.slot, slot) == Scope::block;
    if (!is_own && !(is_barrier && (last_ones || !found.empty()))) continue;
    // A poll that reads the same again adds nothing.
    if (!found.empty() && event.kind == Event::Kind::load && found.back()->kind == Event::Kind::load &&
        found.back()->address == event.address && found.back()->value == event.value &&
        found.back()->at.slot == event.at.slot) {
      found.back() = &event;
      continue;
    }
    found.push_back(&event);
    if (!last_ones && found.size() == count) break;
  }
  if (found.size() > count) found.erase(found.begin(), found.end() - static_cast<ptrdiff_t>(count));
  if (found.empty()) return "    none\n";
  std::string text;
  for (const Event* event : found) text += describe(*event);
  return text;
}

void Memory::fail_race(const Agent& agent, const Access& access, const char* other_what, Epoch other,
                       uint16_t other_site, const char* reason) {
  std::string text = described(agent, access) + "\n  after ";
  const bool is_kernel = other.slot == topology_.kernel(topology_.rank_of(other.slot));
  const bool is_copy = other.slot == topology_.copies();
  const Epoch thread = thread_of(other);
  text += environment_.name_of(thread) + ": ";
  text += is_copy ? describe_copy(static_cast<CopyId>(other.time)) : is_kernel ? "read-only load" : other_what;
  text += is_copy ? ", issued at " : " at ";
  text += sites.name(other_site) + "\n  ";
  text += reason != nullptr ? reason : reason_of(agent, other);
  text +=
      "\n  ordered operations of the earlier's thread since:\n" + events_of(thread.slot, thread.time, 4, false);
  text += "  of the later's thread before:\n" + events_of(thread_of(agent).slot, 0, 6, true);
  environment_.fail("data race", text);
  std::abort();
}

const char* Memory::reason_of(const Agent& agent, Epoch earlier) const {
  if (earlier.slot == topology_.copies()) {
    const Copy& copy = copies_[static_cast<CopyId>(earlier.time)];
    if (copy.kind == Copy::Kind::put && copy.seen_by.empty())
      return "nobody had seen that put delivered: by a quiet, or by a signal behind it";
    if (copy.reading_seen_by.empty()) return "nobody had waited for that copy";
    if (copy.seen_by.empty()) return "of that copy only the reading had been waited for";
    return "that copy was waited for, but nothing orders the wait before the later";
  }
  if (agent.copy == 0) return "nothing orders the earlier before the later";
  const Copy& copy = copies_[agent.copy];
  if (copy.kind == Copy::Kind::put) return "nothing orders the earlier before the put's start";
  if (earlier.slot == copy.issuer.slot ? earlier.time <= copy.issuer.time : copy.known.knows(earlier))
    return "the earlier lies before the copy's start, but no proxy fence (fence_async) lies between";
  return "nothing orders the earlier before the copy's start; a copy reads and writes when it is carried out";
}

std::string Memory::describe_copy(CopyId id) const {
  const Copy& copy = copies_[id];
  static const char* const kKinds[] = {"bulk load", "bulk store", "put"};
  return std::string(kKinds[static_cast<size_t>(copy.kind)]) + " of " + std::to_string(copy.bytes) +
         " bytes, " + place(copy.from) + " to " + place(copy.to);
}

void Memory::fail_outstanding(const Agent& agent, CopyId id) {
  const Copy& copy = copies_[id];
  std::string text = environment_.name_of(agent.now()) + " ends, and nobody has waited for ";
  text += copy.reading_seen_by.empty() ? "" : "the writing of ";
  text += "the " + describe_copy(id) + ", issued by " + environment_.name_of(copy.issuer) + " at " +
          sites.name(copy.site) + "\n  its latest ordered operations:\n" + events_of(agent.slot, 0, 6, true);
  environment_.fail("copies outstanding", text);
  std::abort();
}

std::string Memory::describe_phase_wait(const Agent& agent, uintptr_t address, uint32_t phase,
                                        uint16_t site) const {
  std::string text = "  " + environment_.name_of(agent.now()) + " waits at " + sites.name(site) +
                     " for phase " + std::to_string(phase) + " of mbarrier " + place(address);
  for (const Barrier& barrier : barriers_)
    if (barrier.address == address)
      text += "; it misses " + std::to_string(barrier.missing) + " arrivals and " +
              std::to_string(barrier.bytes) + " bytes";
  return text + "\n";
}

std::string Memory::describe_wait(const Agent& agent, uintptr_t address, Condition condition, Order order,
                                  Scope scope, uint16_t site) const {
  static const char* const kKinds[] = {"== ", "to reach ", "under its mask == ", "to carry tag "};
  std::string text = "  " + environment_.name_of(agent.now()) + " waits at " + sites.name(site) + " for " +
                     place(address) + " " + kKinds[static_cast<size_t>(condition.kind)] +
                     hex(condition.operand) + " (" + word(order) + "." + word(scope) + ")";
  for (const History& history : histories_) {
    if (history.address != address || history.messages.empty()) continue;
    const Message& last = history.messages.back();
    text += "; it holds " + hex(last.value);
    if (last.is_plain)
      text += ", never written since the start";
    else
      text += ", written by " + environment_.name_of(last.writer) + " at " + sites.name(last.site);
  }
  return text + "\n";
}

}  // namespace deepep::emu
