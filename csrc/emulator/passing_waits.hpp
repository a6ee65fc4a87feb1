// For mutants alone: waits that do not wait. The word is read once, in its order, and taken for what was waited
// for.
#pragma once

#include "device/device.hpp"

namespace deepep::dev {

template <class Order, class Scope>
bool emulator_passes_equal(const uint32_t* p, uint32_t, Deadline) {
  (void)load<Order, Scope>(p);
  return true;
}
template <class Order, class Scope>
bool emulator_passes_reached(const uint32_t* p, uint32_t, Deadline) {
  (void)load<Order, Scope>(p);
  return true;
}
template <class Order, class Scope>
bool emulator_passes_masked(const uint32_t* p, uint32_t mask, uint32_t value, Deadline, uint32_t& seen) {
  seen = (load<Order, Scope>(p) & ~mask) | value;
  return true;
}
template <class Order, class Scope>
bool emulator_passes_tag(const uint64_t* p, uint32_t, Deadline, uint32_t& value) {
  value = unpack_tagged(load<Order, Scope>(p)).value;
  return true;
}
template <class Order, class Scope>
bool emulator_passes_signal(const uint64_t* p, uint32_t, Deadline) {
  (void)load<Order, Scope>(p);
  return true;
}
template <class Order, class Scope>
bool emulator_passes_mbarrier(const uint64_t*, uint32_t, Deadline) {
  return true;
}

}  // namespace deepep::dev
