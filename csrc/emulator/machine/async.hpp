// What is carried out later than it is issued: bulk copies, in the async proxy, with the mbarriers that tell
// when; and puts to other nodes, with their signals.
//
// A copy has no place in the clocks. Whoever has waited for it (a thread for its group, threads for the phase
// of an mbarrier) is noted with the moment of that wait, and a later access is ordered behind the copy if it
// knows of one such moment. Before it a copy has what its issuer had before it when it was issued: of other
// copies, that they were waited for; of generic accesses, that a proxy fence or a kernel's end lies between.
// Puts are in no proxy of their own.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator/machine/clock.hpp"
#include "emulator/machine/machine.hpp"

namespace deepep::emu {

using CopyId = uint32_t;  // 0 is none

/// Generic accesses that lie before a proxy fence which is known: in shared memory and in global. No clock:
/// none, but for those that a kernel's start or end has passed.
struct Crossed {
  static constexpr size_t kShared = 0;
  static constexpr size_t kGlobal = 1;
  std::array<ClockRef, 2> in;

  void join(const Crossed& other) {
    for (size_t space = 0; space < in.size(); ++space) in[space].join(other.in[space]);
  }
};

/// Everything `origin` knew at that moment, offered to whoever acquires it within `scope`.
struct Released {
  Scope scope = Scope::block;
  Epoch origin;
  ClockRef known;
  bool merged = false;  // several origins, through a chain of atomics; `origin` is the last
  Crossed crossed;
};

/// What a put does to a signal behind its bytes.
struct Signal {
  uintptr_t address = 0;  // 0: no signal
  uint64_t value = 0;
  bool adds = false;
  bool carries = true;  // who sees it sees the bytes of its put
};

struct Copy {
  enum class Kind : uint8_t { load, store, put } kind = Kind::load;
  enum class State : uint8_t { issued, has_read, done, lost } state = State::issued;
  uint16_t site = 0;
  uintptr_t to = 0;
  uintptr_t from = 0;
  int64_t bytes = 0;
  uint32_t barrier = 0;  // of a load
  Epoch issuer;
  // of the issuer at that moment
  ClockRef known;
  ClockRef at_launch;
  Crossed crossed;
  // of a put
  int rank = 0;
  Signal signal;
  ClockRef released;                   // what a fence of system scope has put before it: that it may read
  std::vector<CopyId> behind;          // puts that are delivered before it, as a fence or a quiet has it
  std::vector<Released> releases;      // what its signal carries
  std::vector<std::byte> data;         // between reading and writing
  std::vector<Epoch> reading_seen_by;  // who has waited for it to have read, and when
  std::vector<Epoch> seen_by;          // who has waited for it to be complete, and when
};

/// What a phase of an mbarrier hands to those who wait for it.
struct BarrierPhase {
  ClockRef released;
  Crossed crossed;
  std::vector<CopyId> loads;
};

struct Barrier {
  uintptr_t address = 0;
  bool is_live = false;
  uint32_t count = 0;    // arrivals that a phase takes
  uint32_t missing = 0;  // of them, in the running phase
  int64_t bytes = 0;     // expected and not yet here
  uint32_t phase = 0;    // the running one
  uint32_t loads_under_way = 0;
  Epoch begun;  // its initialisation
  uint16_t begun_at = 0;
  ClockRef users;  // whoever has used it, and when last
  BarrierPhase running;
  BarrierPhase last;
  std::vector<Slot> waiters;
};

}  // namespace deepep::emu
