// Refusals of the host layer, as the standard exceptions Python knows.
// For the CPU alone: kernels raise nothing.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deepep::host {

inline void expect(bool holds, const char* name, int64_t got, const std::string& expected) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) + "; expected " + expected);
}

inline void expect_at_least(int64_t least, const char* name, int64_t got) {
  if (got < least) expect(false, name, got, std::to_string(least) + " or more");
}

inline void expect_index(const char* name, int64_t index, int64_t count) {
  if (index < 0 || index >= count) expect(false, name, index, "0 .. " + std::to_string(count - 1));
}

}  // namespace deepep::host
