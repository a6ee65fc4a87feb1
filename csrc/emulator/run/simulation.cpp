#include "emulator/run/simulation.hpp"

#include <algorithm>

namespace deepep::emu {

Simulation::Simulation(const Shape& shape, const Plan& plan)
    : shape_(shape),
      plan_(plan),
      topology_{.num_ranks = shape.num_ranks,
                .max_blocks = shape.max_blocks,
                .max_threads = shape.max_threads,
                .ranks_per_node = shape.ranks_per_node > 0 ? shape.ranks_per_node : shape.num_ranks,
                .num_gpus = shape.num_gpus > 0 ? shape.num_gpus : shape.num_ranks},
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

// ---- the run ------------------------------------------------------------------------------------------------

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
    const auto watched =
        std::find_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.watch_ended; });
    if (watched != ranks_.end()) {
      watched->watch_ended = false;
      outcome_.status = Outcome::Status::watched;
      outcome_.rank = static_cast<int>(watched - ranks_.begin());
      outcome_.in_time = watched->watch_in_time;
      outcome_.words = watched->watched_words;
      break;
    }
    deliver_due();
    if (failed_) break;
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
  // The end of a kernel waits for its loads, and makes its stores visible to all: it is as good as a
  // system-wide fence.
  r.boundary = {.scope = Scope::sys, .origin = r.host.now(), .known = r.host.known};
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
  block.loads.clear();
  const auto shared_bytes = static_cast<size_t>(launch.shared_bytes);
  if (shared_bytes > block.shared_capacity) {
    const std::string name =
        "shared memory of rank " + std::to_string(rank) + " block " + std::to_string(index);
    block.shared = memory_.arena.allocate(name, Space::shared, rank, index, shared_bytes);
    block.shared_capacity = shared_bytes;
  } else if (block.shared_capacity != 0) {
    memory_.renew(block.shared, shared_bytes);
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
    fiber.agent.unacquired_crossed = {};
    fiber.agent.crossed = {};
    fiber.agent.unacquired_puts.clear();
    fiber.stores.clear();
    fiber.puts.clear();
    fiber.groups = 0;
    fiber.stack = stacks_.take();
    fiber.context = make_context(fiber.stack, &Simulation::enter, this);
    make_ready(slot);
  }
}

/// The first function on a thread's stack.
void Simulation::enter(void* self) {
  auto& simulation = *static_cast<Simulation*>(self);
  simulation.run_thread([&](Fiber& fiber) {
    fiber.launch->kernel->run(fiber.launch->args.data());
    simulation.thread_ends();
  });
}

void Simulation::thread_ends() {
  Warp& warp = warp_of(running_);
  if (warp.arrived != 0) fail_divergent("a thread ends while others of its warp wait for it");
  if (blocks_[static_cast<size_t>(topology_.block_of(running_))].arrived != 0)
    fail_divergent("a thread ends while others of its block wait for it at a barrier");
  check_copies_done();
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
  r.ended.push_back(r.host.time);
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
  if (step_ > plan_.max_steps)
    fail("livelock", "still running after " + std::to_string(step_) + " steps\n" + story_of_waits());
  deliver_due();
  strike_due();
  if (idle_polls_ > 256 * kManyPolls) {
    // All that runs only looks: what is under way arrives now, and failing that, time passes.
    idle_polls_ = 0;
    if (!wakes_.empty())
      step_ = std::max(step_, wakes_.top().at_step);
    else
      pass_idle_time();
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
    if (wake.slot == topology_.copies()) {
      carry_out(wake.waits);
      if (failed_) return;
      continue;
    }
    const int rank = topology_.rank_of(wake.slot);
    if (wake.slot == topology_.host(rank)) {
      start_kernel(rank);
      continue;
    }
    const Fiber& fiber = fibers_[wake.slot];
    if (fiber.state == Fiber::State::waiting && fiber.waits == wake.waits) make_ready(wake.slot);
  }
}

// ---- Environment -------------------------------------------------------------------------------------------

uint64_t Simulation::delivery_delay(Slot writer) { return scheduler_.delivery_delay(writer / 32); }

uint32_t Simulation::choose_value(uint32_t choices) { return scheduler_.choose_value(choices); }

void Simulation::written(History& history, Slot writer) {
  idle_polls_ = 0;
  idle_jump_ns_ = kIdleJumpNs;
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

void Simulation::wake(const std::vector<Slot>& waiters) {
  for (Slot slot : waiters) push_wake(step_, slot, fibers_[slot].waits);
}

bool Simulation::ended_before(Epoch access, const ClockRef& known) const {
  // What a host did reaches threads through a kernel's start alone, and a read-only load its kernel's end.
  if (!topology_.is_device(access.slot)) return true;
  const std::vector<Fiber::Start>& launches = fibers_[access.slot].launches;
  const auto next = std::find_if(launches.rbegin(), launches.rend(),
                                 [&](const Fiber::Start& start) { return start.time <= access.time; });
  if (next == launches.rend()) return true;
  const int rank = topology_.rank_of(access.slot);
  const std::vector<Time>& ended = ranks_[static_cast<size_t>(rank)].ended;
  const auto number = static_cast<size_t>(next->number);
  return ended.size() >= number && known.knows({topology_.host(rank), ended[number - 1]});
}

void Simulation::fail(const std::string& kind, const std::string& text) {
  if (!in_fiber_ && !is_carrying_) throw HostFailure{kind, text};
  note_failure(kind, text);
  throw Abort{};
}

void Simulation::note_failure(const std::string& kind, const std::string& text) {
  failed_ = true;
  outcome_.status = Outcome::Status::failed;
  outcome_.kind = kind;
  outcome_.text = text;
}

std::string Simulation::name_of(Epoch epoch) const {
  const Slot slot = epoch.slot;
  const int number = topology_.rank_of(slot);
  const std::string rank = number < topology_.num_gpus
                               ? "rank " + std::to_string(number)
                               : "copy engine of rank " + std::to_string(topology_.gpu_of(number));
  if (slot == topology_.kernel(topology_.rank_of(slot)))
    return rank + "'s kernel #" + std::to_string(epoch.time);
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
