#include "emulator/simulation.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace deepep::emu {

namespace {

/// Unwinds the thread that failed; the others are left where they are.
struct Abort {};

}  // namespace

Simulation::Simulation(const Shape& shape, const Plan& plan)
    : shape_(shape),
      plan_(plan),
      topology_{shape.num_ranks, shape.max_blocks, shape.max_threads},
      memory_(topology_, *this),
      scheduler_(topology_, plan.strategy, plan.seed, plan.expected_steps),
      fibers_(topology_.num_slots()),
      warps_(topology_.num_slots() / 32),
      blocks_(static_cast<size_t>(shape.num_ranks * shape.max_blocks)),
      ranks_(static_cast<size_t>(shape.num_ranks)) {
  const ClockRef nothing = memory_.clocks.zero();
  for (int r = 0; r < shape.num_ranks; ++r) {
    Agent& host = ranks_[static_cast<size_t>(r)].host;
    host.slot = topology_.host(r);
    host.time = 1;
    host.known = nothing;
  }
}

Simulation::~Simulation() = default;

// ---- the host's side ---------------------------------------------------------------------------------------

uintptr_t Simulation::allocate(std::string name, Space space, int rank, size_t bytes) {
  return memory_.arena.allocate(std::move(name), space, rank, -1, bytes);
}

void Simulation::host_write(int rank, uintptr_t address, const void* bytes, size_t count) {
  if (count == 0) return;
  memory_.plain_store(ranks_[static_cast<size_t>(rank)].host, address, static_cast<int64_t>(count),
                       memory_.sites.named("its own step"));
  std::memcpy(reinterpret_cast<void*>(address), bytes, count);
}

void Simulation::host_read(int rank, uintptr_t address, void* bytes, size_t count) {
  if (count == 0) return;
  memory_.plain_load(ranks_[static_cast<size_t>(rank)].host, address, static_cast<int64_t>(count),
                       memory_.sites.named("its own step"));
  std::memcpy(bytes, reinterpret_cast<const void*>(address), count);
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
  Fiber& fiber = simulation.self();
  Rank& rank = simulation.ranks_[static_cast<size_t>(simulation.topology_.rank_of(simulation.running_))];
  const Watch& watch = rank.watch;
  try {
    rank.watch_in_time = true;
    for (int i = 0; i < watch.count && rank.watch_in_time; ++i) {
      const uintptr_t word = watch.address + static_cast<uintptr_t>(i * watch.bytes);
      rank.watched_words.emplace_back();
      rank.watch_in_time =
          simulation.wait(reinterpret_cast<const void*>(word), watch.bytes, watch.condition, Order::acquire, Scope::sys,
                          fiber.deadline_ns, rank.watched_words.back(), Site::current());
    }
    rank.watch_ended = true;
    simulation.memory_.teach(rank.host.known, fiber.agent);  // they are one thread
  } catch (const Abort&) {
  }
  fiber.state = Fiber::State::done;
  switch_context(fiber.context, simulation.main_);
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
  if (memory_.arena.find(address, count) == nullptr) throw std::out_of_range("peek outside of allocated memory");
  std::memcpy(bytes, reinterpret_cast<const void*>(address), count);
}

void Simulation::launch(int rank, const KernelSet& set, const std::string& kernel, const void* args, size_t args_bytes,
                        int num_blocks, int num_threads, int64_t shared_bytes) {
  const Kernel* const end = set.kernels + set.count;
  const Kernel* const found = std::find_if(set.kernels, end, [&](const Kernel& k) { return kernel == k.name; });
  if (found == end) throw std::invalid_argument("no kernel named " + kernel);
  if (args_bytes != found->args_bytes) throw std::invalid_argument(kernel + ": arguments of another size");
  if (num_blocks < 1 || num_blocks > shape_.max_blocks) throw std::invalid_argument(kernel + ": number of blocks");
  if (num_threads < 32 || num_threads % 32 != 0 || num_threads > std::min(shape_.max_threads, found->max_threads))
    throw std::invalid_argument(kernel + ": number of threads");
  const auto* bytes = static_cast<const std::byte*>(args);
  Rank& on = ranks_[static_cast<size_t>(rank)];
  on.stream.push_back({false, {&set, found, {bytes, bytes + args_bytes}, num_blocks, num_threads, shared_bytes, 0,
                               num_blocks, ++on.launches}});
  if (std::find(bound_.begin(), bound_.end(), &set) == bound_.end()) bound_.push_back(&set);
}

void Simulation::host_step(int rank) { ranks_[static_cast<size_t>(rank)].stream.push_back({true, {}}); }

Outcome Simulation::run() {
  if (failed_) return outcome_;
  for (const KernelSet* set : bound_) set->bind(this);
  if (outcome_.status == Outcome::Status::host) {
    Rank& rank = ranks_[static_cast<size_t>(outcome_.rank)];  // the host has done its step
    rank.at_host_step = false;
    rank.stream.pop_front();
  }
  outcome_ = {};
  for (int r = 0; r < shape_.num_ranks; ++r) start_next(r);
  while (!failed_) {
    const auto due = std::find_if(ranks_.begin(), ranks_.end(),
                                  [](const Rank& rank) { return rank.at_host_step && !rank.is_frozen; });
    if (due != ranks_.end()) {
      outcome_.status = Outcome::Status::host;
      outcome_.rank = static_cast<int>(due - ranks_.begin());
      break;
    }
    const auto watched = std::find_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.watch_ended; });
    if (watched != ranks_.end()) {
      watched->watch_ended = false;
      outcome_.status = Outcome::Status::watched;
      outcome_.rank = static_cast<int>(watched - ranks_.begin());
      outcome_.in_time = watched->watch_in_time;
      outcome_.words = watched->watched_words;
      break;
    }
    deliver_due();
    strike_due();
    if (!ready_warps_.empty()) {
      const uint32_t warp = ready_warps_[scheduler_.pick(ready_warps_, idle_polls_ >= kManyPolls)];
      resume(warp * 32 + scheduler_.pick_lane(warps_[warp].ready));
      continue;
    }
    if (!wakes_.empty()) {
      step_ = std::max(step_, wakes_.top().at_step);
      continue;
    }
    const bool all_done = std::all_of(ranks_.begin(), ranks_.end(), [this](const Rank& rank) {
      const Fiber::State watcher = fibers_[topology_.watcher(static_cast<int>(&rank - ranks_.data()))].state;
      const bool watches = watcher != Fiber::State::absent && watcher != Fiber::State::done;
      return (rank.stream.empty() && !watches) || (rank.is_frozen && rank.thaws_at_ns == 0);
    });
    if (all_done || !pass_time()) break;
  }
  outcome_.steps = step_;
  outcome_.switches = switches_;
  outcome_.now_ns = now_ns();
  return outcome_;
}

// ---- streams, kernels, blocks ------------------------------------------------------------------------------

void Simulation::start_next(int rank) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  if (r.stream.empty() || r.is_running || r.is_starting || r.at_host_step) return;
  if (r.stream.front().is_host_step) {
    r.at_host_step = true;
    return;
  }
  r.is_starting = true;
  push_wake(step_ + scheduler_.launch_delay(), topology_.host(rank), 0);
}

void Simulation::start_kernel(int rank) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  r.is_starting = false;
  r.is_running = true;
  Launch& launch = r.stream.front().launch;
  Memory::advance(r.host);
  memory_.teach(r.host.known, r.host);  // one clock for all threads of the kernel
  // The end of a kernel waits for its loads, and makes its stores visible to all: it is as good as a system-wide fence.
  r.boundary = {Scope::sys, r.host.now(), r.host.known};
  Memory::advance(r.host);
  const int sms = shape_.num_sms > 0 ? shape_.num_sms : launch.num_blocks;
  while (launch.next_block < std::min(sms, launch.num_blocks)) start_block(rank, launch);
}

void Simulation::start_block(int rank, Launch& launch) {
  const int index = launch.next_block++;
  const Rank& r = ranks_[static_cast<size_t>(rank)];
  Block& block = blocks_[static_cast<size_t>(rank * shape_.max_blocks + index)];
  block.arrived = 0;
  block.done = 0;
  const auto shared_bytes = static_cast<size_t>(launch.shared_bytes);
  if (shared_bytes > block.shared_capacity) {
    const std::string name = "shared memory of rank " + std::to_string(rank) + " block " + std::to_string(index);
    block.shared = memory_.arena.allocate(name, Space::shared, rank, index, shared_bytes);
    block.shared_capacity = shared_bytes;
  } else if (block.shared_capacity != 0) {
    memory_.arena.renew(block.shared, shared_bytes);
  }
  for (int t = 0; t < launch.num_threads; ++t) {
    const Slot slot = topology_.thread(rank, index, t);
    Fiber& fiber = fibers_[slot];
    if (t % 32 == 0) warps_[slot / 32].done = 0;
    fiber.me = {t, index, launch.num_threads, launch.num_blocks};
    fiber.launch = &launch;
    fiber.agent.slot = slot;
    ++fiber.agent.time;
    fiber.launches.push_back({fiber.agent.time, launch.kernel->name, launch.number});
    fiber.agent.known = r.host.known;
    fiber.agent.at_launch = r.host.known;
    fiber.agent.read_only = {topology_.kernel(rank), launch.number};
    fiber.agent.fenced = {Released{}, Released{}, r.boundary};
    fiber.agent.unacquired = {};
    fiber.stack = stacks_.take();
    fiber.context = make_context(fiber.stack, &Simulation::enter, this);
    make_ready(slot);
  }
}

/// The first function on a thread's stack.
void Simulation::enter(void* self) {
  auto& simulation = *static_cast<Simulation*>(self);
  Fiber& fiber = simulation.self();
  try {
    fiber.launch->kernel->run(fiber.launch->args.data());
    simulation.thread_ends();
  } catch (const Abort&) {
  }
  fiber.state = Fiber::State::done;
  switch_context(fiber.context, simulation.main_);
}

void Simulation::thread_ends() {
  Warp& warp = warp_of(running_);
  if (warp.arrived != 0) fail_divergent("a thread ends while others of its warp wait for it");
  if (blocks_[static_cast<size_t>(topology_.block_of(running_))].arrived != 0)
    fail_divergent("a thread ends while others of its block wait for it at a barrier");
  warp.done |= 1u << (running_ % 32);
  idle_polls_ = 0;
}

void Simulation::kernel_ends(int rank) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  const Launch& launch = r.stream.front().launch;
  const Clock* last = nullptr;
  for (int b = 0; b < launch.num_blocks; ++b) {
    for (int t = 0; t < launch.num_threads; ++t) {
      Agent& agent = fibers_[topology_.thread(rank, b, t)].agent;
      if (agent.known.get() != last) r.host.known.join(agent.known);
      last = agent.known.get();
      r.host.known.raise(agent.now());
      agent.at_launch = ClockRef();
    }
  }
  r.host.known.raise({topology_.kernel(rank), launch.number});
  Fiber& watcher = fibers_[topology_.watcher(rank)];
  if (r.watch.until_idle && r.stream.size() == 1) {
    watcher.deadline_ns = 0;
    if (watcher.state == Fiber::State::waiting) make_ready(topology_.watcher(rank));
  }
  r.is_running = false;
  r.stream.pop_front();
  start_next(rank);
}

// ---- who runs ----------------------------------------------------------------------------------------------

void Simulation::make_ready(Slot slot) {
  fibers_[slot].state = Fiber::State::ready;
  const uint32_t index = slot / 32;
  Warp& warp = warps_[index];
  const uint32_t lane = 1u << (slot % 32);
  if (ranks_[static_cast<size_t>(topology_.rank_of(slot))].is_frozen) {
    warp.parked |= lane;
    return;
  }
  if (warp.ready == 0) {
    warp.position = static_cast<uint32_t>(ready_warps_.size());
    ready_warps_.push_back(index);
  }
  warp.ready |= lane;
  if (in_fiber_ && scheduler_.preempts(index, running_ / 32)) preempted_ = true;
}

void Simulation::remove_ready(Slot slot) {
  Warp& warp = warp_of(slot);
  warp.ready &= ~(1u << (slot % 32));
  if (warp.ready != 0) return;
  const uint32_t moved = ready_warps_.back();
  ready_warps_[warp.position] = moved;
  warps_[moved].position = warp.position;
  ready_warps_.pop_back();
}

void Simulation::resume(Slot slot) {
  remove_ready(slot);
  ++switches_;
  running_ = slot;
  Fiber& fiber = fibers_[slot];
  fiber.state = Fiber::State::running;
  me = &fiber.me;
  in_fiber_ = true;
  preempted_ = false;
  switch_context(main_, fiber.context);
  in_fiber_ = false;
  if (fiber.state != Fiber::State::done || failed_) return;

  stacks_.give(fiber.stack);
  if (!topology_.is_device(slot)) return;
  const int block = topology_.block_of(slot);
  Launch& launch = ranks_[static_cast<size_t>(topology_.rank_of(slot))].stream.front().launch;
  if (++blocks_[static_cast<size_t>(block)].done < launch.num_threads) return;
  const int rank = topology_.rank_of(slot);
  if (launch.next_block < launch.num_blocks) start_block(rank, launch);
  if (--launch.blocks_left == 0) kernel_ends(rank);
}

void Simulation::suspend(Fiber::State state) {
  Fiber& fiber = self();
  fiber.state = state;
  switch_context(fiber.context, main_);
}

void Simulation::point() {
  ++step_;
  if (step_ > plan_.max_steps) fail("livelock", "still running after " + std::to_string(step_) + " steps\n" + story_of_waits());
  deliver_due();
  strike_due();
  if (idle_polls_ > 256 * kManyPolls) {
    // All that runs only looks: what is under way arrives now, and failing that, time passes.
    idle_polls_ = 0;
    if (!wakes_.empty())
      step_ = std::max(step_, wakes_.top().at_step);
    else
      ns_at_jump_ += 1'000'000;
  }
  const bool frozen = ranks_[static_cast<size_t>(topology_.rank_of(running_))].is_frozen;
  if (!frozen && !preempted_ && idle_polls_ < kManyPolls && scheduler_.goes_on(running_ / 32, step_)) return;
  const Slot slot = running_;
  make_ready(slot);
  switch_context(fibers_[slot].context, main_);
}

void Simulation::push_wake(uint64_t at_step, Slot slot, uint32_t waits) {
  if (at_step != kNever) wakes_.push({at_step, num_wakes_++, slot, waits});
}

void Simulation::deliver_due() {
  while (!wakes_.empty() && wakes_.top().at_step <= step_) {
    const Wake wake = wakes_.top();
    wakes_.pop();
    const int rank = topology_.rank_of(wake.slot);
    if (wake.slot == topology_.host(rank)) {
      start_kernel(rank);
      continue;
    }
    const Fiber& fiber = fibers_[wake.slot];
    if (fiber.state == Fiber::State::waiting && fiber.waits == wake.waits) make_ready(wake.slot);
  }
}

// ---- faults and time ---------------------------------------------------------------------------------------

void Simulation::strike_due(int writer) {
  for (size_t i = faults_struck_; i < plan_.faults.size(); ++i) {
    const Fault& fault = plan_.faults[i];
    const bool is_due = fault.counts_writes ? fault.rank == writer && ranks_[static_cast<size_t>(writer)].writes >= fault.at_step
                                            : writer < 0 && step_ >= fault.at_step;
    if (!is_due) continue;
    freeze(fault);
    std::swap(plan_.faults[i], plan_.faults[faults_struck_++]);
  }
}

void Simulation::freeze(const Fault& fault) {
  Rank& rank = ranks_[static_cast<size_t>(fault.rank)];
  rank.is_frozen = true;
  rank.thaws_at_ns = fault.pause_ns == 0 ? 0 : now_ns() + fault.pause_ns;
  if (fault.loses_writes && fault.pause_ns == 0) memory_.lose_writes(fault.rank);
  for (Slot slot = 0; slot < topology_.num_slots(); ++slot) {
    if (topology_.rank_of(slot) != fault.rank) continue;
    Warp& warp = warp_of(slot);
    const uint32_t lane = 1u << (slot % 32);
    if ((warp.ready & lane) == 0) continue;
    warp.parked |= lane;
    remove_ready(slot);
  }
}

void Simulation::thaw(int rank) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  r.is_frozen = false;
  for (Slot slot = 0; slot < topology_.num_slots(); ++slot) {
    if (topology_.rank_of(slot) != rank) continue;
    Warp& warp = warp_of(slot);
    const uint32_t lane = 1u << (slot % 32);
    if ((warp.parked & lane) == 0) continue;
    warp.parked &= ~lane;
    make_ready(slot);
  }
}

/// A stopped rank's waits wait for nothing.
bool Simulation::is_waiting_on_time(Slot slot) const {
  return fibers_[slot].state == Fiber::State::waiting &&
         !ranks_[static_cast<size_t>(topology_.rank_of(slot))].is_frozen;
}

bool Simulation::pass_time() {
  uint64_t next = kNever;
  for (Slot slot = 0; slot < topology_.num_slots(); ++slot)
    if (is_waiting_on_time(slot)) next = std::min(next, fibers_[slot].deadline_ns);
  for (const Rank& rank : ranks_)
    if (rank.is_frozen && rank.thaws_at_ns != 0) next = std::min(next, rank.thaws_at_ns);
  if (faults_struck_ == 0 || next == kNever) {
    outcome_.kind = "deadlock";
    outcome_.text = "nothing can run and nothing is under way\n" + story_of_waits();
    outcome_.status = Outcome::Status::failed;
    failed_ = true;
    return false;
  }
  ns_at_jump_ = std::max(now_ns(), next + 1);
  step_at_jump_ = step_;
  for (Slot slot = 0; slot < topology_.num_slots(); ++slot)
    if (is_waiting_on_time(slot) && fibers_[slot].deadline_ns < now_ns()) make_ready(slot);
  for (int r = 0; r < shape_.num_ranks; ++r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.is_frozen && rank.thaws_at_ns != 0 && rank.thaws_at_ns <= now_ns()) thaw(r);
  }
  return true;
}

std::string Simulation::story_of_waits() const {
  std::string text;
  int told = 0;
  int untold = 0;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state != Fiber::State::waiting) continue;
    if (told == 8) {
      ++untold;
      continue;
    }
    ++told;
    text += memory_.describe_wait(fiber.agent, fiber.address, fiber.condition, fiber.order, fiber.scope, fiber.site);
  }
  if (untold > 0) text += "  and " + std::to_string(untold) + " more wait\n";
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (blocks_[b].arrived == 0) continue;
    text += "  rank " + std::to_string(b / static_cast<size_t>(shape_.max_blocks)) + " block " +
            std::to_string(b % static_cast<size_t>(shape_.max_blocks)) + ": " + std::to_string(blocks_[b].arrived) +
            " threads at the barrier of " + memory_.sites.name(blocks_[b].site) + "\n";
  }
  for (size_t w = 0; w < warps_.size(); ++w)
    if (warps_[w].arrived != 0)
      text += "  " + name_of(fibers_[32 * w].agent.now()) + "'s warp: lanes wait in a collective at " +
              memory_.sites.name(warps_[w].site) + "\n";
  return text;
}

// ---- Environment -------------------------------------------------------------------------------------------

uint64_t Simulation::delivery_delay(Slot writer) { return scheduler_.delivery_delay(writer / 32); }

uint32_t Simulation::choose_value(Slot, uint32_t choices) { return scheduler_.choose_value(choices); }

void Simulation::written(History& history, Slot writer) {
  idle_polls_ = 0;
  if (topology_.is_device(writer)) {
    const int rank = topology_.rank_of(writer);
    ++ranks_[static_cast<size_t>(rank)].writes;
    strike_due(rank);
  }
  if (history.waiters.empty()) return;
  const uint64_t arrival = history.messages.back().delivered_at;
  for (Slot slot : history.waiters) {
    push_wake(arrival, slot, fibers_[slot].waits);
    // It may be seen before it must be.
    if (arrival > step_ + 1 && arrival != kNever)
      push_wake(step_ + scheduler_.below(arrival - step_), slot, fibers_[slot].waits);
  }
}

void Simulation::fail(const std::string& kind, const std::string& text) {
  if (!in_fiber_) throw HostFailure{kind, text};
  failed_ = true;
  outcome_.status = Outcome::Status::failed;
  outcome_.kind = kind;
  outcome_.text = text;
  throw Abort{};
}

std::string Simulation::name_of(Epoch epoch) const {
  const Slot slot = epoch.slot;
  const std::string rank = "rank " + std::to_string(topology_.rank_of(slot));
  if (slot == topology_.kernel(topology_.rank_of(slot))) return rank + "'s kernel #" + std::to_string(epoch.time);
  if (!topology_.is_device(slot)) return rank + "'s host";
  const Fiber& fiber = fibers_[slot];
  const auto next = std::find_if(fiber.launches.begin(), fiber.launches.end(),
                                 [&](const Fiber::Start& start) { return start.time > epoch.time; });
  std::string kernel = "nothing";
  if (next != fiber.launches.begin()) {
    const Fiber::Start& start = *std::prev(next);
    kernel = start.kernel;
    if (kernel.ends_with("_kernel")) kernel.resize(kernel.size() - 7);
    kernel += "#" + std::to_string(start.number);
  }
  const int block = topology_.block_of(slot) % shape_.max_blocks;
  return rank + " " + kernel + " block " + std::to_string(block) + " thread " +
         std::to_string(slot % static_cast<Slot>(shape_.max_threads));
}

}  // namespace deepep::emu
