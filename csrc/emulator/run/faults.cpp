// Ranks that stop, and what happens when nothing can run: time passes to a deadline, or the run has failed.
#include <algorithm>
#include <utility>

#include "emulator/run/simulation.hpp"

namespace deepep::emu {

void Simulation::strike_due(int writer) {
  for (size_t i = faults_struck_; i < plan_.faults.size(); ++i) {
    const Fault& fault = plan_.faults[i];
    const uint64_t writes = ranks_[static_cast<size_t>(fault.rank)].writes;
    const bool is_due =
        fault.counts_writes ? fault.rank == writer && writes >= fault.at : writer < 0 && step_ >= fault.at;
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
    note_failure("deadlock", "nothing can run and nothing is under way\n" + story_of_waits());
    return false;
  }
  jump_to(std::max(now_ns(), next + 1));
  return true;
}

void Simulation::pass_idle_time() {
  jump_to(now_ns() + idle_jump_ns_);
  idle_jump_ns_ *= 2;
}

void Simulation::jump_to(uint64_t ns) {
  ns_at_jump_ = ns;
  step_at_jump_ = step_;
  if (faults_struck_ == 0) return;  // nobody is late: who waits is not to give up
  for (Slot slot = 0; slot < topology_.num_slots(); ++slot)
    if (is_waiting_on_time(slot) && fibers_[slot].deadline_ns < now_ns()) make_ready(slot);
  for (int r = 0; r < shape_.num_ranks; ++r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.is_frozen && rank.thaws_at_ns != 0 && rank.thaws_at_ns <= now_ns()) thaw(r);
  }
}

std::string Simulation::story_of_waits() const {
  std::string text;
  int shown = 0;
  int omitted = 0;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state != Fiber::State::waiting) continue;
    if (shown == 8) {
      ++omitted;
      continue;
    }
    ++shown;
    if (fiber.waits_for == Fiber::For::word)
      text += memory_.describe_wait(fiber.agent, fiber.address, fiber.condition, fiber.order, fiber.scope,
                                    fiber.site);
    else if (fiber.waits_for == Fiber::For::phase)
      text += memory_.describe_phase_wait(fiber.agent, fiber.address, fiber.phase, fiber.site);
    else
      text += "  " + name_of(fiber.agent.now()) + " waits at " + memory_.sites.name(fiber.site) +
              " for bulk stores\n";
  }
  if (omitted > 0) text += "  and " + std::to_string(omitted) + " more wait\n";
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (blocks_[b].arrived == 0) continue;
    text += "  rank " + std::to_string(b / static_cast<size_t>(shape_.max_blocks)) + " block " +
            std::to_string(b % static_cast<size_t>(shape_.max_blocks)) + ": " +
            std::to_string(blocks_[b].arrived) + " threads at the barrier of " +
            memory_.sites.name(blocks_[b].site) + "\n";
  }
  for (size_t w = 0; w < warps_.size(); ++w)
    if (warps_[w].arrived != 0)
      text += "  " + name_of(fibers_[32 * w].agent.now()) + "'s warp: lanes wait in a collective at " +
              memory_.sites.name(warps_[w].site) + "\n";
  return text;
}

}  // namespace deepep::emu
