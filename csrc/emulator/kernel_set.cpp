// The kernels of this library: the product's, from their one source, and the emulator's own litmus tests. Compiled on
// its own, with DEEPEP_MUTANT and an altered kernel in the include path, it is a library that the emulator loads.
#if defined(DEEPEP_MUTANT)
#include "emulator/passing_waits.hpp"
#else
#include "emulator/litmus.hpp"
#include "emulator/litmus_bulk.hpp"
#include "emulator/litmus_put.hpp"
#endif
#include "emulator/copy_engine.hpp"
#include "kernels/barrier.hpp"
#include "kernels/combine.hpp"
#include "kernels/copy.hpp"
#include "kernels/dispatch.hpp"
#include "kernels/layout.hpp"

extern "C" __attribute__((visibility("default"))) const deepep::emu::KernelSet* deepep_emulator_kernels() {
  static const deepep::emu::KernelSet set{deepep::emu::kernels_of_this_library().data(),
                                          deepep::emu::kernels_of_this_library().size(),
                                          [](deepep::emu::Machine* machine) { deepep::emu::machine = machine; }};
  return &set;
}
