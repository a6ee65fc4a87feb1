// The emulated machine's memory: real bytes at real addresses, and beside every four of them a cell that
// remembers who wrote and who read them. Everything the kernels may touch is allocated here; an address outside
// is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/machine/clock.hpp"

namespace deepep::emu {

/// Who may touch an allocation: `symmetric` every rank of its domain, `device` and `host` (pinned) their own,
/// `shared` one block. `remote` is what a NIC reads and writes: its own rank touches it, others reach it by
/// puts alone, and puts reach nothing else.
enum class Space : uint8_t { symmetric, device, host, shared, remote };

struct Allocation {
  std::string name;
  Space space = Space::host;
  int rank = -1;
  int block = -1;  // of shared memory; -1 elsewhere
  uintptr_t begin = 0;
  uintptr_t end = 0;
  Epoch zeroed{};  // when its host filled it with zeros, before anything else; time 0: it did not
  uint16_t zeroed_site = 0;
};

/// What is known of four bytes, or, once they were written piecewise, of one.
struct Cell {
  enum class Shape : uint8_t {
    plain,    // read and written plainly so far
    ordered,  // ordered operations reached it: `extra` is its history
    pieces,   // written byte by byte: `extra` is four cells, one a byte
    barrier,  // half of an mbarrier: `extra` is its number
  };
  Epoch write;       // the last plain write
  Epoch read;        // the last plain read, if knowing it means knowing all
  uint32_t readers;  // a read set, by index: other readers since the last write; 0 is none
  uint32_t extra;    // see Shape
  uint16_t write_site;
  uint16_t read_site;
  uint8_t written;  // bit b: byte b has a value
  Shape shape;
  uint16_t unused;
};
static_assert(sizeof(Cell) == 32);

class Arena {
 public:
  static constexpr size_t kDefaultBytes = size_t{1} << 30;
  /// Allocations lie at least this far apart, so that a stray index does not reach the next one.
  static constexpr size_t kGap = 256;

  explicit Arena(size_t bytes = kDefaultBytes);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  /// Fresh memory: no byte of it was ever written.
  uintptr_t allocate(std::string name, Space space, int rank, int block, size_t bytes);
  /// The same, filled with zeros by `writer`. Each cell takes note of it when it is first looked at (touched).
  uintptr_t allocate_zeros(std::string name, Space space, int rank, size_t bytes, Epoch writer, uint16_t site);
  /// Forgets what an allocation held and who touched it, and gives it another size, at most its first: shared
  /// memory at the start of a block.
  void renew(uintptr_t begin, size_t bytes);

  /// Fills bytes with what memory holds that nobody has written.
  static void poison(uintptr_t address, size_t bytes);

  /// The allocation all of [address, address + bytes) lies in, or null.
  [[nodiscard]] const Allocation* find(uintptr_t address, size_t bytes) const {
    const size_t granule = (address - base_) / kGranule;
    if (address < base_ || granule >= used_granules_) return nullptr;
    const Allocation* allocation = &allocations_[owner_[granule]];
    return address >= allocation->begin && address + bytes <= allocation->end ? allocation : nullptr;
  }
  /// The allocation nearest to an address: for telling by how much an access missed.
  [[nodiscard]] const Allocation* nearest(uintptr_t address) const;
  [[nodiscard]] Cell& cell(uintptr_t address) { return cells_[(address - base_) / 4]; }
  /// The same, of an access that may be its first: zeros that it was allocated with are written now.
  [[nodiscard]] Cell& touched(uintptr_t address) {
    Cell& cell = this->cell(address);
    if (cell.written == 0 && cell.write.time == 0) [[unlikely]]
      begin(cell, address);
    return cell;
  }
  [[nodiscard]] const std::vector<Allocation>& allocations() const { return allocations_; }

 private:
  static constexpr size_t kGranule = 128;
  uintptr_t reserve_allocation(std::string name, Space space, int rank, int block, size_t bytes);
  void begin(Cell& cell, uintptr_t address) const;
  uintptr_t base_ = 0;
  Cell* cells_ = nullptr;
  size_t capacity_;
  size_t used_granules_ = 0;
  std::vector<uint16_t> owner_;  // by granule
  std::vector<Allocation> allocations_;
};

}  // namespace deepep::emu
