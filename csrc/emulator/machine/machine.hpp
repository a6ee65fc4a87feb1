// What a kernel compiled for the emulator sees of it: the machine its threads run on, and how a kernel makes
// itself known. device.hpp (the vocabulary's body) is written over this and nothing else, so a set of kernels
// compiled on its own (a mutant, say) can be loaded into a running emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <vector>

namespace deepep::emu {

enum class Order : uint8_t { relaxed, acquire, release, acq_rel };
/// Wider scopes compare greater. Also how far apart two threads are: the scope that includes both.
enum class Scope : uint8_t { block, gpu, sys };
enum class Rmw : uint8_t { add, bit_or };
/// What a proxy fence is for.
enum class Spaces : uint8_t { shared = 1, global = 2, all = 3 };

/// Where in the kernel's source an operation stands: failures are told in these terms.
using Site = std::source_location;

/// What a wait waits for, of the word it reads.
struct Condition {
  enum class Kind : uint8_t { equal, reached, masked, tag } kind;
  uint32_t operand;
  uint32_t mask = 0;

  [[nodiscard]] bool operator()(uint64_t word) const {
    const auto low = static_cast<uint32_t>(word);
    switch (kind) {
      case Kind::equal: return low == operand;
      case Kind::reached: return static_cast<int32_t>(low - operand) >= 0;
      case Kind::masked: return (low & mask) == operand;
      case Kind::tag: return static_cast<uint32_t>(word >> 32) == operand;
    }
    return false;
  }
};

/// The thread that is running, as the kernel may ask.
struct Identity {
  int thread = 0;
  int block = 0;
  int num_threads = 0;
  int num_blocks = 0;
};

/// The machine, as its threads use it. Every call is made by the thread `me` describes; a call that finds the
/// kernel in error does not return.
class Machine {
 public:
  const Identity* me = nullptr;

  /// Checks a plain access and lets it through; the caller then moves the bytes itself.
  virtual void plain_load(const void* p, int bytes, Site site) = 0;
  virtual void plain_store(void* p, int bytes, Site site) = 0;
  /// The read-only path: nobody may write these bytes while the kernel runs.
  virtual void load_once(const void* p, int bytes, Site site) = 0;
  /// The same of what may never have been written.
  virtual void load_guess(const void* p, int bytes, Site site) = 0;

  [[nodiscard]] virtual uint64_t strong_load(const void* p, int bytes, Order, Scope, Site) = 0;
  virtual void strong_store(void* p, int bytes, uint64_t value, Order, Scope, Site) = 0;
  [[nodiscard]] virtual uint64_t strong_rmw(void* p, int bytes, Rmw, uint64_t operand, Order, Scope, Site) = 0;
  virtual void fence(Order, Scope, Site) = 0;
  /// True when a read satisfied `condition`; false when the deadline passed. `seen` is the last word read.
  [[nodiscard]] virtual bool wait(const void* p, int bytes, Condition, Order, Scope, uint64_t deadline_ns,
                                  uint64_t& seen, Site) = 0;

  /// Bulk copies are carried out later, at steps that the schedule chooses: they read at one and write at
  /// another.
  virtual void bulk_load(void* stage, const void* from, int64_t bytes, void* barrier, Site) = 0;
  virtual void bulk_store(void* to, const void* stage, int64_t bytes, Site) = 0;
  virtual void bulk_commit(Site) = 0;
  /// Until all but the last `pending` groups of the thread have read, or have been carried out altogether.
  virtual void bulk_wait(int pending, bool reads_only, Site) = 0;
  virtual void fence_async(Spaces, Site) = 0;
  virtual void mbarrier_init(void* barrier, uint32_t count, Site) = 0;
  virtual void mbarrier_invalidate(void* barrier, Site) = 0;
  /// Arrives once; the running phase then waits for `bytes` more.
  virtual void mbarrier_arrive(void* barrier, int64_t bytes, Order, Scope, Site) = 0;
  /// True when the phase is complete; false when the deadline passed.
  [[nodiscard]] virtual bool mbarrier_wait(const void* barrier, uint32_t phase, Order, Scope,
                                           uint64_t deadline_ns, Site) = 0;

  /// NVSHMEM. `signal` null: none; `adds`: to what it holds. A put has bytes; a signal by itself is a call of
  /// its own.
  virtual void put(void* to, const void* from, int64_t bytes, void* signal, uint64_t value, bool adds, int rank,
                   Site) = 0;
  virtual void signal(void* signal, uint64_t value, bool adds, int rank, Site) = 0;
  virtual void put_fence(Site) = 0;
  virtual void put_quiet(Site) = 0;

  virtual void sync_block(Site site) = 0;
  virtual void sync_warp(Site site) = 0;
  [[nodiscard]] virtual uint32_t ballot(bool p, Site site) = 0;
  [[nodiscard]] virtual uint64_t shuffle(uint64_t value, int source_lane, Site site) = 0;
  [[nodiscard]] virtual int64_t warp_sum(int64_t value, Site site) = 0;
  [[nodiscard]] virtual int64_t warp_exclusive_sum(int64_t value, Site site) = 0;
  [[nodiscard]] virtual uint32_t warp_or(uint32_t value, Site site) = 0;

  [[nodiscard]] virtual uint64_t clock_ns() = 0;
  /// Lets others run.
  virtual void pause() = 0;
  /// The address of a byte of the block's dynamic shared memory.
  [[nodiscard]] virtual std::byte* shared(int64_t byte_offset) = 0;

 protected:
  ~Machine() = default;
};

/// One kernel of a set.
struct Kernel {
  const char* name;
  int max_threads;
  size_t args_bytes;
  void (*run)(const void* args);
};

// Both are hidden symbols: each library of kernels has its own, set when the machine takes the set up.
inline thread_local Machine* machine = nullptr;
inline std::vector<Kernel>& kernels_of_this_library() {
  static std::vector<Kernel> kernels;
  return kernels;
}

struct Registration {
  explicit Registration(const Kernel& kernel) { kernels_of_this_library().push_back(kernel); }
};

/// A library's kernels and the way to point them at a machine. others: where a kernel is looked up that is not
/// in it; null: nowhere. A library of mutants has those kernels alone that its mutation reaches.
struct KernelSet {
  const Kernel* kernels;
  size_t count;
  void (*bind)(Machine*);
  const KernelSet* others = nullptr;
};

}  // namespace deepep::emu
