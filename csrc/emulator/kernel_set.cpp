// The kernels of this library: the product's, from their one source, and the emulator's own litmus tests.
// Compiled on its own, with DEEPEP_MUTANT and an altered kernel in the include path, it is a library that the
// emulator loads.
#if defined(DEEPEP_MUTANT)
#include "emulator/passing_waits.hpp"
#else
#include "emulator/litmus/bulk.hpp"
#include "emulator/litmus/litmus.hpp"
#include "emulator/litmus/put.hpp"
#endif
#include "emulator/copy_engine.hpp"
#include "kernels/barrier/barrier.hpp"
#include "kernels/combine/combine.hpp"
#include "kernels/combine/copy_engine.hpp"
#include "kernels/combine/refused.hpp"
#include "kernels/copy/bulk_copy.hpp"
#include "kernels/copy/copy.hpp"
#include "kernels/dispatch/cached.hpp"
#include "kernels/dispatch/dispatch.hpp"
#include "kernels/dispatch/refused.hpp"
#include "kernels/layout/layout.hpp"
#include "kernels/low_latency/combine.hpp"
#include "kernels/low_latency/combine_receive.hpp"
#include "kernels/low_latency/combine_send.hpp"
#include "kernels/low_latency/dispatch.hpp"
#include "kernels/low_latency/dispatch_receive.hpp"
#include "kernels/low_latency/dispatch_send.hpp"

extern "C" __attribute__((visibility("default"))) const deepep::emu::KernelSet* deepep_emulator_kernels() {
  static const deepep::emu::KernelSet set{
      deepep::emu::kernels_of_this_library().data(), deepep::emu::kernels_of_this_library().size(),
      [](deepep::emu::Machine* machine) { deepep::emu::machine = machine; }};
  return &set;
}
