#include "emulator/machine/arena.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <stdexcept>

namespace deepep::emu {

namespace {

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

/// What memory holds before it is written: a NaN as bf16 and fp32, negative and absurd as an integer.
constexpr int kPoison = 0xff;

}  // namespace

Arena::Arena(size_t bytes) : capacity_(bytes) {
  base_ = reinterpret_cast<uintptr_t>(reserve(capacity_));
  cells_ = static_cast<Cell*>(reserve(capacity_ / 4 * sizeof(Cell)));
  allocations_.push_back({.name = "nothing"});  // what gaps belong to
}

Arena::~Arena() {
  munmap(reinterpret_cast<void*>(base_), capacity_);
  munmap(cells_, capacity_ / 4 * sizeof(Cell));
}

uintptr_t Arena::allocate(std::string name, Space space, int rank, int block, size_t bytes) {
  const uintptr_t begin = reserve_allocation(std::move(name), space, rank, block, bytes);
  poison(begin, bytes);
  return begin;
}

uintptr_t Arena::allocate_zeros(std::string name, Space space, int rank, size_t bytes, Epoch writer,
                                uint16_t site) {
  const uintptr_t begin = reserve_allocation(std::move(name), space, rank, -1, bytes);
  allocations_.back().zeroed = writer;
  allocations_.back().zeroed_site = site;
  return begin;  // memory that was never used is zeros
}

void Arena::begin(Cell& cell, uintptr_t address) const {
  const Allocation& allocation = allocations_[owner_[(address - base_) / kGranule]];
  if (allocation.zeroed.time == 0) return;
  cell.write = allocation.zeroed;
  cell.write_site = allocation.zeroed_site;
  cell.written = 0xf;
}

uintptr_t Arena::reserve_allocation(std::string name, Space space, int rank, int block, size_t bytes) {
  const size_t begin = used_granules_ * kGranule + kGap;
  const size_t end = begin + bytes;
  if (end + kGap > capacity_) throw std::length_error("the emulated machine's memory is full");
  if (allocations_.size() > 0xffff) throw std::length_error("too many allocations");
  used_granules_ = (end + kGranule - 1) / kGranule;
  owner_.resize(used_granules_, 0);
  for (size_t g = begin / kGranule; g < used_granules_; ++g)
    owner_[g] = static_cast<uint16_t>(allocations_.size());
  allocations_.push_back({.name = std::move(name),
                          .space = space,
                          .rank = rank,
                          .block = block,
                          .begin = base_ + begin,
                          .end = base_ + end});
  return base_ + begin;
}

void Arena::poison(uintptr_t address, size_t bytes) {
  std::memset(reinterpret_cast<void*>(address), kPoison, bytes);
}

void Arena::renew(uintptr_t begin, size_t bytes) {
  Allocation& allocation = allocations_[owner_[(begin - base_) / kGranule]];
  allocation.end = begin + bytes;
  poison(begin, bytes);
  std::memset(static_cast<void*>(&cell(begin)), 0, (bytes + 3) / 4 * sizeof(Cell));
}

const Allocation* Arena::nearest(uintptr_t address) const {
  const Allocation* best = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Allocation& a : allocations_) {
    if (a.end == 0) continue;
    const uintptr_t d = address < a.begin ? a.begin - address : address >= a.end ? address - a.end : 0;
    if (d < distance) {
      distance = d;
      best = &a;
    }
  }
  return best;
}

}  // namespace deepep::emu
