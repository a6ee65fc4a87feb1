// A rank of a test of NVSHMEM's own IBRC plug-in, on host memory: it calls the plug-in as NVSHMEM's proxy
// thread does, and the plug-in calls the libibverbs.so.1 that is preloaded.
//
//     ibrc_probe PLUGIN FOLDER ROUNDS BYTES add|set
//
// In every round every rank puts BYTES to every other one, with a signal behind, waits for as many, looks at
// what came, and answers with an atomic. Then all read each other's memory and add to one word of rank 0.
// Prints "wrong W read X sum Y": words that were not there when they were signalled, words read wrongly, and
// by how much the sum is wrong. A rank that gets no signal in IBRC_PROBE_SECONDS prints "missing RANKS" and
// ends with status 3; 4: a call failed; 5: the plug-in is not as ibrc_abi.hpp has it.
#include <dlfcn.h>
#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "ibrc_abi.hpp"
#include "meeting_by_files.hpp"

using namespace ibrc_abi;

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kNotDeclared = 5, kCallFailed = 4, kNoSignal = 3, kFromProxy = 1, kAdditions = 50;

[[noreturn]] void end(int status, const std::string& text) {
  printf("%s\n", text.c_str());
  fflush(stdout);
  _Exit(status);  // the NIC's thread lives: nothing is torn down under it
}

void check(int status, const char* what) {
  if (status != 0) end(kCallFailed, std::string(what) + ": status " + std::to_string(status));
}

int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text != nullptr ? atoi(text) : otherwise;
}

MeetingByFiles* the_meeting;

int alltoall(const void* send, void* receive, int bytes, Bootstrap* bootstrap) {
  const size_t part = static_cast<size_t>(bytes), ranks = static_cast<size_t>(bootstrap->ranks);
  const std::vector<std::byte> all = the_meeting->gather(send, part * ranks);
  for (size_t from = 0; from < ranks; ++from) {
    const size_t at = (from * ranks + static_cast<size_t>(bootstrap->rank)) * part;
    memcpy(static_cast<std::byte*>(receive) + from * part, all.data() + at, part);
  }
  return 0;
}

int no_device(int* device) {
  *device = 0;
  return 0;
}
int no_attribute(int* value, int /*attribute*/, int /*device*/) {  // among others: no DMA-BUF
  *value = 0;
  return 0;
}

/// A transport, the heap of 8-byte words that it has registered, and where the peers' heaps are.
class Heap {
 public:
  Heap(const char* plugin, MeetingByFiles& meeting, int rank, int ranks, size_t words)
      : rank_(rank), ranks_(ranks), memory_(static_cast<uint64_t*>(aligned_alloc(4096, padded(words)))) {
    void* library = dlopen(plugin, RTLD_NOW);
    if (library == nullptr) end(kNotDeclared, dlerror());
    const auto init = reinterpret_cast<Init>(dlsym(library, kInitName));
    if (init == nullptr) end(kNotDeclared, dlerror());
    cuda_.get_device = no_device;
    cuda_.get_attribute = no_attribute;
    check(init(&transport_, &cuda_, kInterface), "init");
    const std::string problem = problem_of(*transport_, reinterpret_cast<const void*>(init));
    if (!problem.empty()) end(kNotDeclared, "not as declared: " + problem);
    memset(memory_, 0, padded(words));
    bootstrap_.rank = rank;
    bootstrap_.ranks = ranks;
    bootstrap_.alltoall = alltoall;
    transport_->bootstrap = &bootstrap_;
    transport_->heap = memory_;
    transport_->log2_granularity = 29;
    transport_->rank = rank;
    transport_->ranks = ranks;
    transport_->egm_regions = &egm_regions_;
    int reached = 0, device = 0;
    check(transport_->can_reach_peer(&reached, nullptr, transport_), "can_reach_peer");
    if (reached != kReachedByCpu) end(kNotDeclared, "reaches peers by " + std::to_string(reached));
    check(transport_->connect(transport_, &device, 1), "connect");
    check(transport_->register_memory(&own_, memory_, padded(words), transport_, false), "register");
    handles_ = shared<MemoryHandle>(meeting, own_);
    bases_ = shared<uint64_t*>(meeting, memory_);
  }

  uint64_t& operator[](size_t word) { return memory_[word]; }
  [[nodiscard]] uint64_t observe(size_t word) const {
    return __atomic_load_n(&memory_[word], __ATOMIC_ACQUIRE);
  }

  void put(int peer, size_t to, size_t from, size_t words) { move(Rma::kPut, peer, to, from, words, true); }
  /// Waits until it is there.
  void get(int peer, size_t from, size_t to, size_t words) { move(Rma::kGet, peer, from, to, words, false); }
  void amo(Amo kind, int peer, size_t word, uint64_t value) {
    AmoTarget target{};
    target.remote = {bases_[static_cast<size_t>(peer)] + word, 0, &handles_[static_cast<size_t>(peer)]};
    target.value = value;
    const AmoVerb verb{kind, 0, 1, 0};
    check(transport_->amo(transport_, peer, nullptr, verb, &target, {0, 8}, kFromProxy), "amo");
  }
  /// Between a put and its signal.
  void fence(int peer) {
    if (transport_->fence != nullptr) check(transport_->fence(transport_, peer, kFromProxy), "fence");
  }
  void progress() { check(transport_->progress(transport_), "progress"); }
  void quiet(int peer) { check(transport_->quiet(transport_, peer, kFromProxy), "quiet"); }
  void close() {
    check(transport_->enforce_consistency_at_target(transport_), "enforce_consistency_at_target");
    check(transport_->release_memory(&own_, transport_), "release");
    check(transport_->finalize(transport_), "finalize");
  }

 private:
  static size_t padded(size_t words) { return (8 * words + 4095) / 4096 * 4096; }
  template <class T>
  std::vector<T> shared(MeetingByFiles& meeting, const T& mine) const {
    const std::vector<std::byte> all = meeting.gather(&mine, sizeof mine);
    std::vector<T> values(static_cast<size_t>(ranks_));
    memcpy(values.data(), all.data(), all.size());
    return values;
  }
  void move(Rma kind, int peer, size_t remote, size_t local, size_t words, bool is_nonblocking) {
    Place there{bases_[static_cast<size_t>(peer)] + remote, 0, &handles_[static_cast<size_t>(peer)]};
    Place here{memory_ + local, 0, &own_};
    const RmaVerb verb{kind, is_nonblocking ? 1 : 0, 0, nullptr};
    check(transport_->rma(transport_, peer, verb, &there, &here, {words, 8, 1, 1}, kFromProxy), "rma");
  }

  int rank_, ranks_;
  uint64_t* memory_;
  Transport* transport_ = nullptr;
  Bootstrap bootstrap_{};
  CudaFunctions cuda_{};
  std::unordered_map<void*, size_t> egm_regions_;
  MemoryHandle own_{};
  std::vector<MemoryHandle> handles_;
  std::vector<uint64_t*> bases_;
};

/// Where in a heap what lies, in words.
struct Places {
  size_t words, ranks;
  [[nodiscard]] size_t inbox(int from) const { return static_cast<size_t>(from) * words; }
  [[nodiscard]] size_t outbox() const { return ranks * words; }
  [[nodiscard]] size_t mirror() const { return (ranks + 1) * words; }
  [[nodiscard]] size_t signal(int from) const { return (ranks + 2) * words + static_cast<size_t>(from); }
  [[nodiscard]] size_t answer(int from) const { return signal(from) + ranks; }
  [[nodiscard]] size_t sum() const { return (ranks + 2) * words + 2 * ranks; }
  [[nodiscard]] size_t end() const { return sum() + 1; }
};

uint64_t pattern(uint64_t round, int rank, size_t word) {
  return round << 40 | static_cast<uint64_t>(rank) << 32 | static_cast<uint64_t>(word);
}

uint64_t count_wrong(Heap& heap, size_t at, size_t words, uint64_t round, int rank) {
  uint64_t wrong = 0;
  for (size_t i = 0; i < words; ++i) wrong += heap[at + i] != pattern(round, rank, i) ? 1 : 0;
  return wrong;
}

class Rank {
 public:
  Rank(Heap& heap, const Places& at, int rank, int ranks) : heap_(heap), at_(at), rank_(rank), ranks_(ranks) {}

  void send(uint64_t round, Amo signal) {
    for (size_t i = 0; i < at_.words; ++i) heap_[at_.outbox() + i] = pattern(round, rank_, i);
    for_peers([&](int peer) {
      heap_.put(peer, at_.inbox(rank_), at_.outbox(), at_.words);
      heap_.fence(peer);
      heap_.amo(signal, peer, at_.signal(rank_), signal == Amo::kSignalSet ? round : 1);
    });
  }
  /// Looks at each peer's words once it has signalled; answers.
  void receive(uint64_t round) {
    std::vector<bool> seen(static_cast<size_t>(ranks_));
    wait([&](int peer) {
      if (seen[static_cast<size_t>(peer)]) return true;
      if (heap_.observe(at_.signal(peer)) < round) return false;
      wrong += count_wrong(heap_, at_.inbox(peer), at_.words, round, peer);
      heap_.amo(Amo::kSignalAdd, peer, at_.answer(rank_), 1);
      seen[static_cast<size_t>(peer)] = true;
      return true;
    });
    wait([&](int peer) { return heap_.observe(at_.answer(peer)) >= round; });
  }
  void read(uint64_t round) {
    for_peers([&](int peer) {
      heap_.get(peer, at_.outbox(), at_.mirror(), at_.words);
      misread += count_wrong(heap_, at_.mirror(), at_.words, round, peer);
    });
  }
  void add() {
    for (int i = 0; i < kAdditions; ++i) {
      heap_.amo(i % 2 == 0 ? Amo::kAdd : Amo::kSignalAdd, 0, at_.sum(), static_cast<uint64_t>(rank_) + 1);
    }
    heap_.quiet(0);
  }

  uint64_t wrong = 0, misread = 0;

 private:
  template <class Function>
  void for_peers(const Function& function) const {
    for (int i = 1; i < ranks_; ++i) function((rank_ + i) % ranks_);
  }
  /// Until `is_done` says so of every peer; nothing inside NVSHMEM has a deadline, so this has one.
  template <class Function>
  void wait(const Function& is_done) {
    static const auto patience = std::chrono::seconds(number("IBRC_PROBE_SECONDS", 60));
    const auto deadline = Clock::now() + patience;
    while (true) {
      std::string missing;
      for_peers([&](int peer) {
        if (!is_done(peer)) missing += " " + std::to_string(peer);
      });
      if (missing.empty()) return;
      if (Clock::now() > deadline) end(kNoSignal, "missing" + missing);
      heap_.progress();
      sched_yield();
    }
  }

  Heap& heap_;
  Places at_;
  int rank_, ranks_;
};

}  // namespace

int main(int, char** argv) {
  const int rank = number("RANK", 0), ranks = number("WORLD_SIZE", 1);
  const uint64_t rounds = strtoull(argv[3], nullptr, 10);
  const Places at{strtoull(argv[4], nullptr, 10) / 8, static_cast<size_t>(ranks)};
  const Amo signal = std::string(argv[5]) == "set" ? Amo::kSignalSet : Amo::kSignalAdd;
  MeetingByFiles meeting(argv[2], rank, ranks);
  the_meeting = &meeting;
  Heap heap(argv[1], meeting, rank, ranks, at.end());
  Rank self(heap, at, rank, ranks);
  for (uint64_t round = 1; round <= rounds; ++round) {
    self.send(round, signal);
    self.receive(round);
  }
  self.read(rounds);
  self.add();
  meeting.barrier();
  const uint64_t expected = kAdditions * static_cast<uint64_t>(ranks * (ranks + 1) / 2);
  const uint64_t off = rank == 0 ? heap.observe(at.sum()) - expected : 0;
  heap.close();
  end(0, "wrong " + std::to_string(self.wrong) + " read " + std::to_string(self.misread) + " sum " +
             std::to_string(off));
}
