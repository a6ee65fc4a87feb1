// The cells of an access: whole ones, or the pieces of those that were written byte by byte.
#pragma once

#include "emulator/machine/memory.hpp"

namespace deepep::emu {

template <class Each>
void Memory::for_cells(const Agent& agent, const Access& access, const Each& each) {
  const uintptr_t end = access.address + static_cast<uintptr_t>(access.bytes);
  for (uintptr_t word = access.address & ~uintptr_t{3}; word < end; word += 4) {
    Cell& cell = arena.touched(word);
    if (cell.shape == Cell::Shape::plain && word >= access.address && word + 4 <= end) [[likely]] {
      each(cell, uint8_t{0xf});
      continue;
    }
    if (cell.shape == Cell::Shape::barrier) fail_barrier(agent, access, "there is an mbarrier in use");
    const unsigned first = word < access.address ? static_cast<unsigned>(access.address - word) : 0;
    const unsigned last = word + 4 <= end ? 4 : static_cast<unsigned>(end - word);
    if (cell.shape == Cell::Shape::ordered) {
      // A history covers whole words: a narrower access to one is judged as an access to all of it.
      each(cell, static_cast<uint8_t>((1u << last) - (1u << first)));
      continue;
    }
    if (cell.shape == Cell::Shape::plain) split(cell);
    for (unsigned b = first; b < last; ++b) each(pieces_[cell.extra][b], uint8_t{0xf});
  }
}

}  // namespace deepep::emu
