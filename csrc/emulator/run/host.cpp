// The host's side of the emulated machine: memory, launches, watches.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "emulator/run/simulation.hpp"

namespace deepep::emu {

uintptr_t Simulation::allocate(std::string name, Space space, int rank, size_t bytes) {
  return memory_.arena.allocate(std::move(name), space, rank, -1, bytes);
}

uintptr_t Simulation::allocate_zeros(std::string name, Space space, int rank, size_t bytes) {
  return memory_.arena.allocate_zeros(std::move(name), space, rank, bytes, idle_host(rank).now(),
                                      memory_.sites.named("its own step"));
}

Agent& Simulation::idle_host(int rank) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  if (!r.stream.empty() && !(r.at_host_step && r.stream.size() == 1))
    throw std::logic_error("the host of rank " + std::to_string(rank) +
                           " touches memory while its stream is busy");
  return r.host;
}

void Simulation::host_write(int rank, uintptr_t address, const void* bytes, size_t count) {
  if (count == 0) return;
  memory_.plain_store(idle_host(rank), address, static_cast<int64_t>(count),
                      memory_.sites.named("its own step"));
  std::memcpy(reinterpret_cast<void*>(address), bytes, count);
}

void Simulation::host_read(int rank, uintptr_t address, void* bytes, size_t count) {
  if (count == 0) return;
  memory_.plain_load(idle_host(rank), address, static_cast<int64_t>(count),
                     memory_.sites.named("its own step"));
  std::memcpy(bytes, reinterpret_cast<const void*>(address), count);
}

void Simulation::host_forget(int rank, uintptr_t address, size_t count) {
  if (count == 0) return;
  memory_.forget(idle_host(rank), address, static_cast<int64_t>(count), memory_.sites.named("its own step"));
}

void Simulation::watch(int rank, const Watch& watch) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  const Slot slot = topology_.watcher(rank);
  Fiber& fiber = fibers_[slot];
  fiber.me = {0, 0, 1, 1};
  fiber.agent.slot = slot;
  ++fiber.agent.time;
  fiber.agent.known = r.host.known;
  memory_.teach(fiber.agent.known, r.host);
  Memory::advance(r.host);
  fiber.deadline_ns = watch.until_idle && r.stream.empty() ? 0 : now_ns() + watch.timeout_ns;
  fiber.stack = stacks_.take();
  fiber.context = make_context(fiber.stack, &Simulation::enter_watch, this);
  r.watch = watch;
  r.watched_words.clear();
  r.watch_ended = false;
  make_ready(slot);
}

void Simulation::enter_watch(void* self) {
  auto& simulation = *static_cast<Simulation*>(self);
  Rank& rank = simulation.ranks_[static_cast<size_t>(simulation.topology_.rank_of(simulation.running_))];
  simulation.run_thread([&](Fiber& fiber) {
    const Watch& watch = rank.watch;
    const uint16_t site = simulation.memory_.sites.named("its watch");
    rank.watch_in_time = true;
    for (int i = 0; i < watch.count && rank.watch_in_time; ++i) {
      const uintptr_t word = watch.address + static_cast<uintptr_t>(i * watch.bytes);
      rank.watched_words.emplace_back();
      rank.watch_in_time = simulation.wait_at(word, watch.bytes, watch.condition, Order::acquire, Scope::sys,
                                              fiber.deadline_ns, rank.watched_words.back(), site);
    }
    rank.watch_ended = true;
    simulation.memory_.teach(rank.host.known, fiber.agent);  // they are one thread
  });
}

void Simulation::watcher_read(int rank, uintptr_t address, void* bytes, size_t count) {
  if (count == 0) return;
  memory_.plain_load(fibers_[topology_.watcher(rank)].agent, address, static_cast<int64_t>(count),
                     memory_.sites.named("its watch"));
  std::memcpy(bytes, reinterpret_cast<const void*>(address), count);
}

void Simulation::meet() {
  agents_.clear();
  for (Rank& rank : ranks_) {
    Memory::advance(rank.host);
    agents_.push_back(&rank.host);
  }
  memory_.synchronize(agents_, memory_.sites.named("the hosts' meeting"));
}

void Simulation::peek(uintptr_t address, void* bytes, size_t count) const {
  if (memory_.arena.find(address, count) == nullptr)
    throw std::out_of_range("peek outside of allocated memory");
  std::memcpy(bytes, reinterpret_cast<const void*>(address), count);
}

void Simulation::launch(int rank, const KernelSet& set, const std::string& kernel, const void* args,
                        size_t args_bytes, int num_blocks, int num_threads, int64_t shared_bytes) {
  const Kernel* found = nullptr;
  const KernelSet* holder = &set;
  for (; holder != nullptr; holder = holder->others) {
    const Kernel* const end = holder->kernels + holder->count;
    found = std::find_if(holder->kernels, end, [&](const Kernel& k) { return kernel == k.name; });
    if (found != end) break;
  }
  if (holder == nullptr) throw std::invalid_argument("no kernel named " + kernel);
  if (args_bytes != found->args_bytes) throw std::invalid_argument(kernel + ": arguments of another size");
  if (num_blocks < 1 || num_blocks > shape_.max_blocks)
    throw std::invalid_argument(kernel + ": number of blocks");
  if (num_threads < 32 || num_threads % 32 != 0 ||
      num_threads > std::min(shape_.max_threads, found->max_threads))
    throw std::invalid_argument(kernel + ": number of threads");
  const auto* bytes = static_cast<const std::byte*>(args);
  Rank& on = ranks_[static_cast<size_t>(rank)];
  on.stream.push_back({false,
                       {.set = holder,
                        .kernel = found,
                        .args = {bytes, bytes + args_bytes},
                        .num_blocks = num_blocks,
                        .num_threads = num_threads,
                        .shared_bytes = shared_bytes,
                        .blocks_left = num_blocks,
                        .number = ++on.launches}});
  if (std::find(bound_.begin(), bound_.end(), holder) == bound_.end()) bound_.push_back(holder);
}

void Simulation::host_step(int rank) { ranks_[static_cast<size_t>(rank)].stream.push_back({true, {}}); }

}  // namespace deepep::emu
