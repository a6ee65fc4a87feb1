// The kernels of this library: the emulator's own litmus tests, and the product's, from their one source. Also compiled
// on its own, against altered kernels, into libraries that the emulator loads (docs/emulator.md).
#include "emulator/litmus.hpp"
#include "kernels/barrier.hpp"
#include "kernels/combine.hpp"
#include "kernels/dispatch.hpp"
#include "kernels/layout.hpp"

extern "C" __attribute__((visibility("default"))) const deepep::emu::KernelSet* deepep_emulator_kernels() {
  static const deepep::emu::KernelSet set{deepep::emu::kernels_of_this_library().data(),
                                          deepep::emu::kernels_of_this_library().size(),
                                          [](deepep::emu::Machine* machine) { deepep::emu::machine = machine; }};
  return &set;
}
