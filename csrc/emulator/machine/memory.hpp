// The memory model. Plain accesses are checked, ordered ones are carried out.
//
// Causality is the PTX model's: program order, barriers, and a release pattern observed by an acquire pattern
// whose scopes include each other. It is kept as vector clocks. A plain access that is not ordered after a
// conflicting one is a data race, and an error whatever the schedule made of it; so plain data needs no delayed
// delivery. Ordered accesses have their consequences: every word they touch keeps the values written to it, and
// a load may return any that causality and coherence still allow, until the write's delivery makes it visible
// to all.
//
// An agent is whoever has a place in the clocks: a thread, or a rank's host. Bulk copies have none: async.hpp.
#pragma once

#include <array>
#include <deque>
#include <string>
#include <vector>

#include "emulator/machine/arena.hpp"
#include "emulator/machine/async.hpp"
#include "emulator/machine/clock.hpp"
#include "emulator/machine/machine.hpp"
#include "emulator/machine/sites.hpp"

namespace deepep::emu {

struct Agent {
  Slot slot = 0;
  Time time = 0;
  ClockRef known;
  ClockRef at_launch;                  // what was known when its kernel started
  Epoch read_only;                     // as whom its kernel reads through the read-only path
  std::array<Released, 3> fenced;      // by scope: what its last releasing fence covers
  std::array<ClockRef, 3> unacquired;  // by distance: what relaxed loads observed, for a fence to acquire
  std::array<Crossed, 3> unacquired_crossed;
  std::vector<CopyId> unacquired_puts;
  Crossed crossed;                             // what of all this lies before a proxy fence
  CopyId copy = 0;                             // of a copy that is carried out: which (async.cpp)
  mutable std::array<CopyId, 16> seen_done{};  // copies it was found to know complete; by number, modulo

  [[nodiscard]] Epoch now() const { return {slot, time}; }
  [[nodiscard]] bool knows(Epoch epoch) const { return epoch.slot == slot || known.knows(epoch); }
};

/// Which rank and block each slot belongs to, and how far two slots are apart. Behind the threads, every rank
/// has a warp's worth of slots of its host.
struct Topology {
  int num_ranks;
  int max_blocks;   // per rank
  int max_threads;  // per block
  int ranks_per_node;
  int num_gpus;  // ranks past them are copy engines: of GPU 0, 1, ...

  [[nodiscard]] int gpu_of(int rank) const { return rank % num_gpus; }
  [[nodiscard]] bool same_node(int a, int b) const {
    return gpu_of(a) / ranks_per_node == gpu_of(b) / ranks_per_node;
  }
  [[nodiscard]] Slot device_slots() const { return static_cast<Slot>(num_ranks * max_blocks * max_threads); }
  [[nodiscard]] Slot num_slots() const { return host(num_ranks); }
  [[nodiscard]] Slot thread(int rank, int block, int thread) const {
    return static_cast<Slot>((rank * max_blocks + block) * max_threads + thread);
  }
  /// The rank's host, and its stream: what is enqueued starts with what the host knows.
  [[nodiscard]] Slot host(int rank) const { return device_slots() + 32 * static_cast<Slot>(rank); }
  /// Stands for all of a rank's running kernel: reads through the read-only path are its.
  [[nodiscard]] Slot kernel(int rank) const { return host(rank) + 1; }
  /// Behind all that have a place in the clocks: copies, by their number as the time; and whoever carries them
  /// out.
  [[nodiscard]] Slot copies() const { return num_slots(); }
  [[nodiscard]] Slot carrier() const { return num_slots() + 1; }
  [[nodiscard]] Slot clock_slots() const { return num_slots() + 2; }
  /// The rank's host while it watches what a running kernel writes.
  [[nodiscard]] Slot watcher(int rank) const { return host(rank) + 2; }
  [[nodiscard]] bool is_device(Slot slot) const { return slot < device_slots(); }
  [[nodiscard]] int block_of(Slot slot) const {
    return static_cast<int>(slot) / max_threads;
  }  // over all ranks
  [[nodiscard]] int rank_of(Slot slot) const {
    return is_device(slot) ? block_of(slot) / max_blocks : static_cast<int>(slot - device_slots()) / 32;
  }
  [[nodiscard]] Scope distance(Slot a, Slot b) const {
    if (!is_device(a) || !is_device(b)) return a == b ? Scope::block : Scope::sys;
    if (block_of(a) == block_of(b)) return Scope::block;
    return rank_of(a) == rank_of(b) ? Scope::gpu : Scope::sys;
  }
};

inline constexpr uint64_t kNever = UINT64_MAX;

/// A value an ordered write (or, as the first, a plain one) gave to a word.
struct Message {
  uint64_t value = 0;
  Epoch writer;
  Scope scope = Scope::sys;
  bool is_plain = false;
  uint16_t site = 0;
  uint64_t step = 0;
  uint64_t delivered_at = 0;  // from this step on, no load may miss it
  std::vector<Released> releases;
  std::vector<CopyId> puts;  // whose signals it stands for
};

/// That an agent read message number `index`, or a later one.
struct Seen {
  Epoch reader;
  uint64_t index;
  Scope scope;
  uint16_t site;
};

/// A word that ordered operations touch: its values in coherence order, the newest last.
struct History {
  uintptr_t address = 0;
  int bytes = 0;
  uint64_t first = 0;  // number of messages[0]
  std::vector<Message> messages;
  std::vector<Seen> seen;
  std::vector<Slot> waiters;

  [[nodiscard]] uint64_t latest() const { return first + messages.size() - 1; }
};

/// An ordered operation or a barrier, as the log keeps it for the report.
struct Event {
  enum class Kind : uint8_t {
    load,
    store,
    rmw,
    fence,
    sync,
    proxy_fence,  // value: spaces
    copy,         // value: the copy's number
    wait_copies,  // value: groups that may be pending; with the highest bit: only their reading was waited for
    arrive,       // value: bytes expected
    wait_phase,  // value: the phase
    put_order,   // value: 1 quiet, 0 fence
  } kind;
  Order order;
  Scope scope;
  uint16_t site;
  Epoch at;
  uint64_t step = 0;
  uintptr_t address = 0;
  uint64_t value = 0;
  Epoch from{};  // of a load or rmw: who wrote what it read
};

/// The dice and the consequences: what the memory asks of the simulation around it.
class Environment {
 public:
  [[nodiscard]] virtual uint64_t step() const = 0;
  /// How many steps a write may stay invisible.
  [[nodiscard]] virtual uint64_t delivery_delay(Slot writer) = 0;
  /// Which of `choices` equally lawful values a load returns; the last is the newest.
  [[nodiscard]] virtual uint32_t choose_value(uint32_t choices) = 0;
  /// The word has a new value for its waiters to look at.
  virtual void written(History& history, Slot writer) = 0;
  /// Those who wait for the mbarrier, or the thread that waits for its copies, may look again.
  virtual void wake(const std::vector<Slot>& waiters) = 0;
  /// A put has to wait for others: it is looked at again later.
  virtual void retry(CopyId put) = 0;
  /// Whether the end of the access's kernel lies between it and a thread with this knowledge.
  [[nodiscard]] virtual bool ended_before(Epoch access, const ClockRef& known) const = 0;
  [[noreturn]] virtual void fail(const std::string& kind, const std::string& text) = 0;
  [[nodiscard]] virtual std::string name_of(Epoch epoch) const = 0;

 protected:
  ~Environment() = default;
};

class Memory {
 public:
  Memory(const Topology& topology, Environment& environment);

  Arena arena;
  ClockPool clocks;

  // plain accesses (plain.cpp)
  void plain_load(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site);
  void plain_store(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site);
  void load_once(Agent& agent, uintptr_t address, int bytes, uint16_t site);
  /// The same of what may never have been written.
  void load_guess(Agent& agent, uintptr_t address, int bytes, uint16_t site);
  /// A plain store of nothing: the bytes are as if never written.
  void forget(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site);

  // ordered accesses (ordered.cpp)
  [[nodiscard]] uint64_t strong_load(Agent& agent, uintptr_t address, int bytes, Order, Scope, uint16_t site);
  void strong_store(Agent& agent, uintptr_t address, int bytes, uint64_t value, Order, Scope, uint16_t site);
  [[nodiscard]] uint64_t strong_rmw(Agent& agent, uintptr_t address, int bytes, Rmw, uint64_t operand, Order,
                                    Scope, uint16_t site);
  void fence(Agent& agent, Order, Scope, uint16_t site);
  /// The word's history, for a wait to register with. Only after a strong_load of the same word.
  [[nodiscard]] History& history_at(uintptr_t address) { return histories_[arena.cell(address).extra]; }

  /// Writes of a rank that are still under way are lost with it, its copies among them.
  void lose_writes(int rank);

  // bulk copies (async.cpp)
  /// Checks a copy as far as can be at its start, and takes note of what its issuer knows. `barrier`: of a
  /// load.
  [[nodiscard]] CopyId issue(Agent& agent, Copy::Kind kind, uintptr_t to, uintptr_t from, int64_t bytes,
                             uintptr_t barrier, uint16_t site);
  /// The copy's next step: it reads, then it writes and is complete.
  void carry_out(CopyId id);
  [[nodiscard]] const Copy& copy(CopyId id) const { return copies_[id]; }
  /// The agent has waited for the copy, or only for its reading.
  void observe_copy(Agent& agent, CopyId id, bool reads_only);
  void log_wait(Agent& agent, int pending, bool reads_only, uint16_t site);
  void fence_async(Agent& agent, Spaces spaces, uint16_t site);
  /// Fails because a thread, or a block, ends before somebody has waited for this copy.
  [[noreturn]] void fail_outstanding(const Agent& agent, CopyId id);

  // puts (put.cpp)
  [[nodiscard]] CopyId issue_put(Agent& agent, uintptr_t to, uintptr_t from, int64_t bytes,
                                 const Signal& signal, int rank, const std::vector<CopyId>& behind,
                                 uint16_t site);
  /// Whether the agent knows that the put was issued.
  [[nodiscard]] bool knows_issue(const Agent& agent, CopyId id) const {
    return agent.knows(copies_[id].issuer);
  }
  void log_put_order(Agent& agent, bool is_quiet, uint16_t site);

  // mbarriers (mbarrier.cpp)
  void init_barrier(Agent& agent, uintptr_t address, uint32_t count, uint16_t site);
  void invalidate_barrier(Agent& agent, uintptr_t address, uint16_t site);
  void arrive(Agent& agent, uintptr_t address, int64_t bytes, Order, Scope, uint16_t site);
  /// Whether the phase is complete; then what it released and copied is known.
  [[nodiscard]] bool try_phase(Agent& agent, uintptr_t address, uint32_t phase, Order, Scope, uint16_t site);
  /// The barrier that a thread waits at. Only after a try_phase at the same address.
  [[nodiscard]] Barrier& barrier_at(uintptr_t address) { return barriers_[arena.cell(address).extra]; }
  /// Shared memory at the start of a block: all is forgotten.
  void renew(uintptr_t begin, size_t bytes);

  // what barriers and launches do to knowledge (ordered.cpp)
  /// Every agent then knows what any of them knew.
  void synchronize(const std::vector<Agent*>& agents, uint16_t site);
  /// Adds what `agent` knows, its own doings included, to `known`.
  void teach(ClockRef& known, const Agent& agent) const;
  /// Ends the agent's present moment: what it does from here on is not covered by what it has released so far.
  static void advance(Agent& agent) { ++agent.time; }

  // for reports (report.cpp)
  [[nodiscard]] std::string place(uintptr_t address) const;
  [[nodiscard]] std::string describe_wait(const Agent& agent, uintptr_t address, Condition, Order, Scope,
                                          uint16_t site) const;
  [[nodiscard]] std::string describe_phase_wait(const Agent& agent, uintptr_t address, uint32_t phase,
                                                uint16_t site) const;
  [[nodiscard]] std::string describe_copy(CopyId id) const;
  SiteTable sites;

 private:
  struct Access {
    const char* what;
    uintptr_t address;
    int64_t bytes;
    uint16_t site;
  };

  /// Who reads four bytes beside `Cell::read`: threads by their clock (or none), and copies.
  struct ReadSet {
    ClockRef threads;
    std::vector<CopyId> copies;
  };

  void check_reach(const Agent& agent, const Access& access);
  [[nodiscard]] bool is_reachable(const Agent& agent, const Allocation& allocation) const;
  /// As Agent::knows, also of copies, and, for copies, of accesses in the generic proxy.
  [[nodiscard]] bool knows(const Agent& agent, Epoch epoch) const {
    if (agent.knows(epoch)) return true;
    return (agent.copy != 0 || epoch.slot == topology_.copies()) && knows_otherwise(agent, epoch, false);
  }
  /// What clocks alone do not tell; `reading`: a copy's reading is enough.
  [[nodiscard]] bool knows_otherwise(const Agent& agent, Epoch epoch, bool reading) const;
  [[nodiscard]] static bool has_observer(const std::vector<Epoch>& observers, const ClockRef& known,
                                         Epoch self);
  void check_copy(const Agent& agent, const Access& access, bool in_shared);
  /// The copy in the part of an agent: it knows what crossed to the async proxy before it was issued.
  [[nodiscard]] Agent carrier(CopyId id, size_t space);
  [[nodiscard]] CopyId begin_copy(Agent& agent, Copy copy);
  /// The same place of symmetric memory, on another rank.
  [[nodiscard]] uintptr_t counterpart(const Agent& agent, const Access& access, int rank);
  void set_signal(const Copy& copy, CopyId id);
  /// The agent has acquired the put's signal: it sees its bytes, and what was delivered before.
  void observe_put(Agent& agent, CopyId id);
  void read_source(Copy& copy, CopyId id);
  void write_target(Copy& copy, CopyId id);
  void load_cell(Agent& agent, Cell& cell, uint8_t mask, const Access& access);
  void store_cell(Agent& agent, Cell& cell, uint8_t mask, const Access& access);
  void load_cell_once(Agent& agent, Cell& cell, uint8_t mask, const Access& access);
  /// Calls `each(cell, mask)` for all cells of the access, or their pieces; `mask` has the bytes concerned.
  template <class Each>
  void for_cells(const Agent& agent, const Access& access, const Each& each);
  void split(Cell& cell);
  /// Makes a cell in pieces whole again, for an ordered access by an agent that knows all that was done to
  /// them.
  void unify(const Agent& agent, Cell& cell, const Access& access);
  void note_read(const Agent& agent, Cell& cell, Epoch as, uint16_t site);
  [[nodiscard]] uint32_t new_read_set();
  void drop_readers(Cell& cell);
  void check_write_known(const Agent& agent, const Cell& cell, const Access& access);
  void check_reads_known(const Agent& agent, const Cell& cell, const Access& access);
  void check_messages_known(const Agent& agent, const History& history, const Access& access, bool readers_too);
  void dissolve(History& history);

  History& open_history(Agent& agent, const Access& access, bool is_store);
  void check_strong(const Agent& agent, History& history, Scope scope, const Access& access, bool is_store);
  [[nodiscard]] uint64_t oldest_lawful(const Agent& agent, const History& history) const;
  void note_seen(Agent& agent, History& history, uint64_t index, Scope scope, uint16_t site);
  void observe(Agent& agent, const Message& message, Order order, Scope scope);
  void learn(Agent& agent, const Released& released);
  [[nodiscard]] std::vector<Released> releases_of(Agent& agent, Order order, Scope scope);
  /// `put`: whose signal it is, if it is one.
  void append(Agent& agent, History& history, Message message, Epoch put = {});

  [[nodiscard]] Barrier& live_barrier(Agent& agent, const Access& access);
  void complete_phase(Barrier& barrier);
  void complete_bytes(Barrier& barrier, const Copy& copy, CopyId id);
  [[noreturn]] void fail_barrier(const Agent& agent, const Access& access, const std::string& why) const;
  void log(Event event);

  // report.cpp
  [[noreturn]] void fail_race(const Agent& agent, const Access& access, const char* other_what, Epoch other,
                              uint16_t other_site, const char* reason);
  /// Fails unless all bytes of an ordered access were written.
  void check_written(const Agent& agent, const Access& access);
  [[noreturn]] void fail_unwritten(const Agent& agent, const Access& access);
  [[nodiscard]] std::string described(const Agent& agent, const Access& access) const;
  /// Of a copy, the moment it was issued; of others, the same.
  [[nodiscard]] Epoch thread_of(Epoch epoch) const;
  [[nodiscard]] Epoch thread_of(const Agent& agent) const;
  /// Why the earlier access does not lie before the later.
  [[nodiscard]] const char* reason_of(const Agent& agent, Epoch earlier) const;
  [[nodiscard]] std::string describe(const Event& event) const;
  /// Up to `count` logged operations of a thread, or barriers of its block: the first from `from` on, or the
  /// last.
  [[nodiscard]] std::string events_of(Slot slot, Time from, size_t count, bool last_ones) const;

  Topology topology_;
  Environment& environment_;
  std::deque<History> histories_;
  std::vector<uint32_t> free_histories_;
  std::deque<std::array<Cell, 4>> pieces_;
  std::vector<ReadSet> read_sets_;
  std::vector<uint32_t> free_read_sets_;
  std::deque<Copy> copies_;
  std::vector<CopyId> under_way_;
  std::deque<Barrier> barriers_;
  std::vector<uint32_t> free_barriers_;
  std::vector<Event> events_;
  uint64_t num_events_ = 0;
};

}  // namespace deepep::emu
