// What a library of kernels shows to the emulator: included once, by the source that includes its kernels.
#pragma once

#include "emulator/machine/machine.hpp"

extern "C" __attribute__((visibility("default"))) deepep::emu::KernelSet* deepep_emulator_kernels() {
  static deepep::emu::KernelSet set{
      deepep::emu::kernels_of_this_library().data(), deepep::emu::kernels_of_this_library().size(),
      [](deepep::emu::Machine* machine) { deepep::emu::machine = machine; }};
  return &set;
}
