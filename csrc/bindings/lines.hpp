// Time lines of warps (host/line_room.hpp) for Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "host/line_room.hpp"

namespace deepep::bindings {

/// Methods of a domain whose launcher records.
template <class Domain>
void bind_lines(pybind11::class_<Domain>& domain) {
  domain
      .def(
          "open_lines",
          [](Domain& self, uintptr_t words, int64_t num_words) {
            self.launcher().lines().open(reinterpret_cast<uint64_t*>(words), num_words);
          },
          pybind11::arg("words"), pybind11::arg("num_words"),
          "Has launches record time lines in memory that is zero, each in a part of its own, while it lasts.")
      .def(
          "close_lines",
          [](Domain& self) {
            std::vector<std::tuple<std::string, int, int, int64_t>> launches;
            for (const host::RecordedLaunch& launch : self.launcher().lines().close())
              launches.emplace_back(launch.kernel, launch.num_blocks, launch.num_warps, launch.first_word);
            return launches;
          },
          "Ends that. The launches meanwhile: operation, blocks, warps of each, first word or -1.");
}

inline void bind_line_constants(pybind11::module_& m) {
  m.attr("LINE_WORDS") = kernels::kLineWords;
  m.attr("LINE_TIME_BITS") = kernels::kLineTimeBits;
  m.attr("NUM_LINE_STEPS") = static_cast<int>(kernels::Step::kNumSteps);
}

}  // namespace deepep::bindings
