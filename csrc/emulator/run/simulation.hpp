// The emulated machine: ranks with their streams, kernels whose threads are fibers, one scheduler over all of
// them.
//
// It runs on one OS thread and is a function of its inputs: the same memory, launches, strategy and seed give
// the same schedule. Threads change places only where they could tell the difference: at ordered accesses,
// waits, barriers and warp collectives. Plain accesses need no such point, because an unordered pair of them is
// an error in any schedule (memory.hpp).
#pragma once

#include <deque>
#include <exception>
#include <queue>
#include <string>
#include <vector>

#include "emulator/machine/memory.hpp"
#include "emulator/run/fiber.hpp"
#include "emulator/run/scheduler.hpp"

namespace deepep::emu {

struct Shape {
  int num_ranks = 1;
  int max_blocks = 1;         // per launch
  int max_threads = 32;       // per block; a multiple of 32
  int num_sms = 0;            // blocks of a rank that can be resident together; 0: all
  int ranks_per_node = 0;     // ranks that reach each other's memory; 0: all
  int num_gpus = 0;           // ranks past them are copy engines, each of one of them in turn; 0: none is
  int max_open_puts = 0;      // to each rank: one more that is not delivered yet is a failure; 0: any number
  bool weak_signals = false;  // one that is set, not added, may come before the bytes of its own put
};

/// A rank that stops running at a step, or after its n-th ordered write: for good, or until `pause_ns` later.
struct Fault {
  int rank = -1;
  uint64_t at = 0;  // the step, or the number of writes
  bool counts_writes = false;
  uint64_t pause_ns = 0;      // 0: for good
  bool loses_writes = false;  // if for good: what it wrote and nobody has seen yet never arrives
};

struct Plan {
  Strategy strategy = Strategy::random;
  uint64_t seed = 0;
  uint64_t expected_steps = 20000;
  uint64_t max_steps = 20'000'000;
  /// Without a fault a wait that can never be satisfied is a failure at once; with one, time passes to its
  /// deadline.
  std::vector<Fault> faults;
};

/// Consecutive words of a host, of `bytes` each. `until_idle`: the watch ends with the rank's stream as well.
struct Watch {
  uintptr_t address = 0;
  int bytes = 4;
  int count = 1;
  Condition condition{};
  uint64_t timeout_ns = 0;
  bool until_idle = false;
};

struct Outcome {
  enum class Status : uint8_t { done, host, watched, failed } status = Status::done;
  int rank = -1;                // host: whose stream has reached a host step; watched: whose watch has ended
  bool in_time = true;          // watched: whether the words came
  std::vector<uint64_t> words;  // watched: as far as they came
  std::string kind;             // failed: what kind of failure
  std::string text;             // failed: the story
  uint64_t steps = 0;
  uint64_t switches = 0;
  uint64_t now_ns = 0;
};

/// Unwinds the thread that failed; the others are left where they are.
struct Abort {};

/// Thrown to the host when its own access fails a check.
struct HostFailure {
  std::string kind;
  std::string text;
};

class Simulation final : public Machine, private Environment {
 public:
  Simulation(const Shape& shape, const Plan& plan);
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;
  ~Simulation();

  [[nodiscard]] uintptr_t allocate(std::string name, Space space, int rank, size_t bytes);
  /// The same, filled with zeros by the rank's host.
  [[nodiscard]] uintptr_t allocate_zeros(std::string name, Space space, int rank, size_t bytes);
  /// A rank's host writes or reads memory, or hands it to new use: then whoever touched it must be done, and
  /// nothing of it may be read before it is written again. The rank's stream must be idle or at a host step.
  void host_write(int rank, uintptr_t address, const void* bytes, size_t count);
  void host_read(int rank, uintptr_t address, void* bytes, size_t count);
  void host_forget(int rank, uintptr_t address, size_t count);
  /// The rank's host watches words while its kernel runs, until they satisfy the condition or the deadline has
  /// passed: then run() returns with them. What else it reads as a watcher must have been released to it with a
  /// word.
  void watch(int rank, const Watch& watch);
  void watcher_read(int rank, uintptr_t address, void* bytes, size_t count);
  /// All ranks' hosts meet: each then knows what any of them did, as after a collective of the process group.
  void meet();
  /// Bytes that `rank` has put to another so far, signals not counted.
  [[nodiscard]] int64_t put_bytes(int rank, int to) const;
  /// What memory holds now, for looking at after a failure: no check, no effect.
  void peek(uintptr_t address, void* bytes, size_t count) const;

  /// Puts a kernel on a rank's stream. `set` must outlive the simulation.
  void launch(int rank, const KernelSet& set, const std::string& kernel, const void* args, size_t args_bytes,
              int num_blocks, int num_threads, int64_t shared_bytes);
  /// Puts a host step on a rank's stream: run() returns when it is due, and resumes after it when called again.
  void host_step(int rank);
  /// Runs until all streams are empty, a host step is due, or something fails.
  Outcome run();

  // Machine
  void plain_load(const void* p, int bytes, Site site) override;
  void plain_store(void* p, int bytes, Site site) override;
  void load_once(const void* p, int bytes, Site site) override;
  void load_guess(const void* p, int bytes, Site site) override;
  uint64_t strong_load(const void* p, int bytes, Order, Scope, Site) override;
  void strong_store(void* p, int bytes, uint64_t value, Order, Scope, Site) override;
  uint64_t strong_rmw(void* p, int bytes, Rmw, uint64_t operand, Order, Scope, Site) override;
  void fence(Order, Scope, Site) override;
  bool wait(const void* p, int bytes, Condition, Order, Scope, uint64_t deadline_ns, uint64_t& seen,
            Site) override;
  void bulk_load(void* stage, const void* from, int64_t bytes, void* barrier, Site) override;
  void bulk_store(void* to, const void* stage, int64_t bytes, Site) override;
  void bulk_commit(Site) override;
  void bulk_wait(int pending, bool reads_only, Site) override;
  void fence_async(Spaces, Site) override;
  void mbarrier_init(void* barrier, uint32_t count, Site) override;
  void mbarrier_invalidate(void* barrier, Site) override;
  void mbarrier_arrive(void* barrier, int64_t bytes, Order, Scope, Site) override;
  bool mbarrier_wait(const void* barrier, uint32_t phase, Order, Scope, uint64_t deadline_ns, Site) override;
  void put(void* to, const void* from, int64_t bytes, void* signal, uint64_t value, bool adds, int rank,
           Site) override;
  void signal(void* signal, uint64_t value, bool adds, int rank, Site) override;
  void put_fence(Site) override;
  void put_quiet(Site) override;
  void sync_block(Site site) override;
  void sync_warp(Site site) override;
  uint32_t ballot(bool p, Site site) override;
  uint64_t shuffle(uint64_t value, int source_lane, Site site) override;
  int64_t warp_sum(int64_t value, Site site) override;
  int64_t warp_exclusive_sum(int64_t value, Site site) override;
  uint32_t warp_or(uint32_t value, Site site) override;
  uint64_t clock_ns() override;
  void pause() override;
  std::byte* shared(int64_t byte_offset) override;

 private:
  static constexpr uint64_t kNsPerStep = 10;
  /// So many reads and looks at the clock with nothing changed in between: whoever runs is spinning.
  static constexpr uint64_t kManyPolls = 64;
  static constexpr uint64_t kIdleJumpNs = 1'000'000;

  struct Launch {
    const KernelSet* set;
    const Kernel* kernel;
    std::vector<std::byte> args;
    int num_blocks;
    int num_threads;
    int64_t shared_bytes;
    int next_block = 0;   // blocks before it have become resident
    int blocks_left = 0;  // resident or to come
    int number = 0;       // of the rank's launches
  };
  struct Item {
    bool is_host_step;
    Launch launch;
  };
  struct Rank {
    Released boundary;  // what the kernel in front of the running one left behind
    Agent host;         // also the stream: kernels start with what it knows, and it learns what they did
    std::deque<Item> stream;
    int launches = 0;
    std::vector<CopyId> puts;        // that no quiet has waited for
    std::vector<int> open_puts;      // by the rank they go to: not delivered yet
    std::vector<int64_t> put_bytes;  // by the rank they go to
    std::vector<Slot> quieting;      // threads that wait for some of them
    std::vector<Time> ended;         // of each kernel: the host's time behind it
    bool is_running = false;         // the stream's first item is a kernel that has started
    bool is_starting = false;        // or one that starts at a step to come
    bool at_host_step = false;
    Watch watch;
    std::vector<uint64_t> watched_words;
    bool watch_ended = false;
    bool watch_in_time = false;
    bool is_frozen = false;
    uint64_t writes = 0;  // ordered ones of its kernels
    uint64_t thaws_at_ns = 0;
  };
  struct Fiber {
    enum class State : uint8_t {
      absent,
      ready,
      running,
      waiting,
      collective,
      barrier,
      done
    } state = State::absent;
    Context context;
    Identity me;
    Agent agent;
    const Launch* launch = nullptr;
    struct Start {
      Time time;
      const char* kernel;
      int number;
    };
    std::vector<Start> launches;  // what it has been a thread of, and from when on
    std::byte* stack = nullptr;
    uint64_t result = 0;  // of a warp collective
    struct Store {
      CopyId id;
      uint32_t group;
    };
    std::vector<Store> stores;  // bulk stores it has not waited for
    uint32_t groups = 0;        // committed so far; those of the running kernel end with it
    /// Its puts, and what lies before them: those in `latest` are ordered behind all of `before`, not among
    /// each other.
    struct Puts {
      std::vector<CopyId> before;
      std::vector<CopyId> latest;
    };
    std::vector<Puts> puts;  // by the rank they go to
    // while waiting
    enum class For : uint8_t { word, phase, copies } waits_for = For::word;
    uint32_t phase = 0;
    uintptr_t address = 0;
    Condition condition{};
    Order order{};
    Scope scope{};
    uint16_t site = 0;
    uint64_t deadline_ns = 0;
    uint32_t waits = 0;  // how many there have been: a wake-up for a former one is void
  };
  enum class Collective : uint8_t { sync, ballot, shuffle, sum, exclusive_sum, disjunction };
  struct Warp {
    uint32_t ready = 0;   // lanes that can run
    uint32_t parked = 0;  // lanes that could, were the rank not frozen
    uint32_t done = 0;
    uint32_t arrived = 0;  // lanes at the collective
    uint32_t at_barrier = 0;
    Collective collective{};
    uint16_t site = 0;
    uint64_t values[32];
    uint8_t sources[32];
    uint32_t position = 0;  // in ready_warps_
  };
  struct Block {
    int arrived = 0;
    int done = 0;
    uint16_t site = 0;
    uintptr_t shared = 0;
    size_t shared_capacity = 0;
    std::vector<CopyId> loads;  // of its threads
  };
  struct Wake {
    uint64_t at_step;
    uint64_t order;
    Slot slot;  // a thread that waits; a rank's host: its next kernel starts; a copy, by its number in `waits`
    uint32_t waits;
    friend bool operator<(const Wake& a, const Wake& b) {  // the earliest is the greatest
      return a.at_step != b.at_step ? a.at_step > b.at_step : a.order > b.order;
    }
  };

  // Environment
  uint64_t step() const override { return step_; }
  uint64_t delivery_delay(Slot writer) override;
  uint32_t choose_value(uint32_t choices) override;
  void written(History& history, Slot writer) override;
  void wake(const std::vector<Slot>& waiters) override;
  void retry(CopyId put) override;
  bool ended_before(Epoch access, const ClockRef& known) const override;
  [[noreturn]] void fail(const std::string& kind, const std::string& text) override;
  std::string name_of(Epoch epoch) const override;

  // simulation.cpp, host.cpp, faults.cpp
  void note_failure(const std::string& kind, const std::string& text);
  static void enter(void* self);
  static void enter_watch(void* self);
  /// Runs `body` as the thread that is on, to its end or to its failure, and leaves its stack for good.
  template <class Body>
  void run_thread(const Body& body);
  /// The rank's host, for an access of its own. Throws std::logic_error while its stream is busy.
  [[nodiscard]] Agent& idle_host(int rank);
  void start_next(int rank);
  void start_kernel(int rank);
  void start_block(int rank, Launch& launch);
  void thread_ends();
  void kernel_ends(int rank);
  void make_ready(Slot slot);
  void remove_ready(Slot slot);
  void suspend(Fiber::State state);
  void point();
  void resume(Slot slot);
  void push_wake(uint64_t at_step, Slot slot, uint32_t waits);
  void deliver_due();
  /// Faults whose step, or whose write (by `writer`, if not negative), has come.
  void strike_due(int writer = -1);
  void freeze(const Fault& fault);
  void thaw(int rank);
  /// Nothing can run and nothing is under way: lets time pass to the next deadline, or fails.
  bool pass_time();
  /// All that runs only looks: lets some time pass, more each time until something changes.
  void pass_idle_time();
  /// Time goes on; waits whose deadline has passed end, and ranks that paused go on, if any rank was made to
  /// stop.
  void jump_to(uint64_t ns);
  [[nodiscard]] bool is_waiting_on_time(Slot slot) const;
  [[nodiscard]] std::string story_of_waits() const;
  [[nodiscard]] uint64_t now_ns() const { return (step_ - step_at_jump_) * kNsPerStep + ns_at_jump_; }

  // together.cpp
  bool wait_at(uintptr_t address, int bytes, Condition, Order, Scope, uint64_t deadline_ns, uint64_t& seen,
               uint16_t site);
  void arrive(Collective collective, uint64_t value, int source_lane, Site site);
  [[noreturn]] void fail_divergent(const std::string& what);

  // copying.cpp
  void begin(CopyId id);
  void carry_out(CopyId id);
  void begin_put(uintptr_t to, uintptr_t from, int64_t bytes, Signal signal, int rank, uint16_t site);
  /// A thread ends, or the last of its block: nothing may be left of its copies.
  void check_copies_done();
  /// Suspends the thread until no copy of its that `is_missing` accepts is left.
  template <class IsMissing>
  void wait_for_copies(const IsMissing& is_missing, uint16_t site);

  [[nodiscard]] Fiber& self() { return fibers_[running_]; }
  [[nodiscard]] Warp& warp_of(Slot slot) { return warps_[slot / 32]; }

  Shape shape_;
  Plan plan_;
  Topology topology_;
  Memory memory_;
  Scheduler scheduler_;
  StackPool stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Rank> ranks_;
  std::vector<uint32_t> ready_warps_;
  std::priority_queue<Wake> wakes_;
  std::vector<Agent*> agents_;  // scratch of barriers
  std::vector<const KernelSet*> bound_;
  Context main_;
  Slot running_ = 0;
  bool in_fiber_ = false;
  bool is_carrying_ = false;  // a copy is being carried out
  bool preempted_ = false;
  uint64_t step_ = 1;
  uint64_t step_at_jump_ = 0;
  uint64_t ns_at_jump_ = 1000;
  uint64_t switches_ = 0;
  uint64_t num_wakes_ = 0;
  uint64_t idle_polls_ = 0;              // reads and looks at the clock since anything last changed
  uint64_t idle_jump_ns_ = kIdleJumpNs;  // how much time passes next if they go on
  size_t faults_struck_ = 0;
  bool failed_ = false;
  Outcome outcome_;
};

template <class Body>
void Simulation::run_thread(const Body& body) {
  Fiber& fiber = self();
  try {
    body(fiber);
  } catch (const Abort&) {
  } catch (const std::exception& error) {
    note_failure("internal error", error.what());
  }
  fiber.state = Fiber::State::done;
  switch_context(fiber.context, main_);
}

}  // namespace deepep::emu
