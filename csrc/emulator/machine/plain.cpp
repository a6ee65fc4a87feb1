// Plain accesses: reach, initialisation, races. The bytes themselves are moved by the caller.
#include "emulator/machine/cells.hpp"

namespace deepep::emu {

void Memory::check_reach(const Agent& agent, const Access& access) {
  const auto bytes = static_cast<size_t>(access.bytes);
  const Allocation* allocation = arena.find(access.address, bytes);
  if (allocation == nullptr) environment_.fail("out of bounds", described(agent, access));
  const bool is_device = topology_.is_device(agent.slot);
  if (is_device && access.address % bytes != 0)
    environment_.fail("misaligned access", described(agent, access));
  if (!is_reachable(agent, *allocation))
    environment_.fail("foreign memory", described(agent, access) + ": not this thread's to touch");
}

bool Memory::is_reachable(const Agent& agent, const Allocation& allocation) const {
  if (allocation.space == Space::symmetric)
    return topology_.same_node(allocation.rank, topology_.rank_of(agent.slot));
  if (allocation.rank != topology_.rank_of(agent.slot) &&
      (allocation.space != Space::device || allocation.rank != topology_.gpu_of(topology_.rank_of(agent.slot))))
    return false;
  return allocation.space != Space::shared ||
         (topology_.is_device(agent.slot) &&
          allocation.block == topology_.block_of(agent.slot) % topology_.max_blocks);
}

// ---- cells -------------------------------------------------------------------------------------------------

void Memory::split(Cell& cell) {
  std::array<Cell, 4> pieces;
  for (unsigned b = 0; b < 4; ++b) {
    pieces[b] = cell;
    pieces[b].written = (cell.written >> b) & 1u ? 0xf : 0;
    if (cell.readers != 0) {
      pieces[b].readers = new_read_set();
      read_sets_[pieces[b].readers] = read_sets_[cell.readers];
    }
  }
  drop_readers(cell);
  cell.shape = Cell::Shape::pieces;
  cell.extra = static_cast<uint32_t>(pieces_.size());
  pieces_.push_back(pieces);
}

void Memory::unify(const Agent& agent, Cell& cell, const Access& access) {
  std::array<Cell, 4>& pieces = pieces_[cell.extra];
  uint8_t written = 0;
  for (unsigned b = 0; b < 4; ++b) {
    check_write_known(agent, pieces[b], access);
    check_reads_known(agent, pieces[b], access);
    drop_readers(pieces[b]);
    written = static_cast<uint8_t>(written | (pieces[b].written != 0 ? 1u << b : 0u));
  }
  cell = pieces[0];
  cell.written = written;
  cell.shape = Cell::Shape::plain;
  cell.extra = 0;
}

uint32_t Memory::new_read_set() {
  if (free_read_sets_.empty()) {
    read_sets_.emplace_back();
    return static_cast<uint32_t>(read_sets_.size() - 1);
  }
  const uint32_t index = free_read_sets_.back();
  free_read_sets_.pop_back();
  return index;
}

void Memory::drop_readers(Cell& cell) {
  if (cell.readers != 0) {
    read_sets_[cell.readers].threads = ClockRef();
    read_sets_[cell.readers].copies.clear();
    free_read_sets_.push_back(cell.readers);
    cell.readers = 0;
  }
  cell.read = {};
}

// ---- checks ------------------------------------------------------------------------------------------------

void Memory::check_write_known(const Agent& agent, const Cell& cell, const Access& access) {
  if (knows(agent, cell.write)) return;
  fail_race(agent, access, "plain store", cell.write, cell.write_site, nullptr);
}

void Memory::check_reads_known(const Agent& agent, const Cell& cell, const Access& access) {
  if (cell.readers == 0 || !read_sets_[cell.readers].threads) {
    if (!knows(agent, cell.read)) fail_race(agent, access, "plain load", cell.read, cell.read_site, nullptr);
    if (cell.readers == 0) return;
  }
  for (CopyId id : read_sets_[cell.readers].copies) {
    const Epoch reader{topology_.copies(), static_cast<Time>(id)};
    if (!knows_otherwise(agent, reader, copies_[id].kind != Copy::Kind::put))
      fail_race(agent, access, "", reader, copies_[id].site, nullptr);
  }
  const ClockRef& set = read_sets_[cell.readers].threads;
  if (!set) return;
  Time unknown = 0;
  for (Slot s = 0; s < clocks.width(); ++s) unknown |= static_cast<Time>(set[s] > agent.known[s]);
  if (unknown == 0) return;
  for (Slot s = 0; s < clocks.width(); ++s)
    if (!knows(agent, {s, set[s]}))
      fail_race(agent, access, "plain load", {s, set[s]}, cell.read_site, nullptr);
}

void Memory::note_read(const Agent& agent, Cell& cell, Epoch as, uint16_t site) {
  cell.read_site = site;
  if (cell.readers != 0 && read_sets_[cell.readers].threads) {
    read_sets_[cell.readers].threads.raise(as);
    return;
  }
  if (agent.knows(cell.read)) {
    cell.read = as;
    return;
  }
  if (cell.readers == 0) cell.readers = new_read_set();
  ClockRef& threads = read_sets_[cell.readers].threads;
  threads = clocks.zero();
  threads.raise(cell.read);
  threads.raise(as);
}

void Memory::load_cell(Agent& agent, Cell& cell, uint8_t mask, const Access& access) {
  if (cell.read == agent.now() && cell.readers == 0) return;  // read before, and not written since
  if ((cell.written & mask) != mask) fail_unwritten(agent, access);
  check_write_known(agent, cell, access);
  if (cell.shape == Cell::Shape::ordered) check_messages_known(agent, histories_[cell.extra], access, false);
  note_read(agent, cell, agent.now(), access.site);
}

void Memory::store_cell(Agent& agent, Cell& cell, uint8_t mask, const Access& access) {
  check_write_known(agent, cell, access);
  check_reads_known(agent, cell, access);
  if (cell.shape == Cell::Shape::ordered) {
    check_messages_known(agent, histories_[cell.extra], access, true);
    dissolve(histories_[cell.extra]);
  }
  drop_readers(cell);
  cell.write = agent.now();
  cell.write_site = access.site;
  cell.written |= mask;
}

void Memory::load_cell_once(Agent& agent, Cell& cell, uint8_t mask, const Access& access) {
  // Another thread of the kernel has passed all of this, and a write since would have been an error.
  if (cell.read == agent.read_only && cell.readers == 0) return;
  const auto check_before_launch = [&](Epoch writer, const char* what, uint16_t site) {
    const bool is_copy = writer.slot == topology_.copies();
    if (is_copy ? !has_observer(copies_[static_cast<CopyId>(writer.time)].seen_by, agent.at_launch,
                                {topology_.carrier(), 0})
                : !agent.at_launch.knows(writer))
      fail_race(agent, access, what, writer, site,
                "the read-only path is for bytes that nobody writes while the kernel runs");
  };
  check_before_launch(cell.write, "plain store", cell.write_site);
  if (cell.shape == Cell::Shape::ordered)
    for (const Message& m : histories_[cell.extra].messages) check_before_launch(m.writer, "store", m.site);
  if ((cell.written & mask) != mask) fail_unwritten(agent, access);
  note_read(agent, cell, agent.read_only, access.site);
}

// ---- the accesses ------------------------------------------------------------------------------------------

void Memory::plain_load(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site) {
  const Access access{"plain load", address, bytes, site};
  check_reach(agent, access);
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) { load_cell(agent, cell, mask, access); });
}

void Memory::plain_store(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site) {
  const Access access{"plain store", address, bytes, site};
  check_reach(agent, access);
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) { store_cell(agent, cell, mask, access); });
}

void Memory::forget(Agent& agent, uintptr_t address, int64_t bytes, uint16_t site) {
  const Access access{"handing over", address, bytes, site};
  check_reach(agent, access);
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) {
    store_cell(agent, cell, mask, access);
    cell.written = static_cast<uint8_t>(cell.written & ~mask);
  });
  Arena::poison(address, static_cast<size_t>(bytes));
}

void Memory::load_once(Agent& agent, uintptr_t address, int bytes, uint16_t site) {
  const Access access{"read-only load", address, bytes, site};
  check_reach(agent, access);
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) { load_cell_once(agent, cell, mask, access); });
}

void Memory::load_guess(Agent& agent, uintptr_t address, int bytes, uint16_t site) {
  const Access access{"read-only load", address, bytes, site};
  check_reach(agent, access);
  for_cells(agent, access, [&](Cell& cell, uint8_t mask) {
    if ((cell.written & mask) == mask) load_cell_once(agent, cell, mask, access);
  });
}

}  // namespace deepep::emu
