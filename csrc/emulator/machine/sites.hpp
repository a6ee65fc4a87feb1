// Source locations as 16-bit numbers, so that every cell can remember where it was last written and read.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/machine/machine.hpp"

namespace deepep::emu {

class SiteTable {
 public:
  SiteTable() { names_.emplace_back("nowhere"); }

  [[nodiscard]] uint16_t id(Site site) {
    // A source_location is one pointer to a constant of its call site.
    static_assert(sizeof(Site) == sizeof(uintptr_t));
    const auto key = std::bit_cast<uintptr_t>(site);
    Entry& entry = cache_[(key >> 3) % cache_.size()];
    if (entry.key != key) entry = {key, look_up(site)};
    return entry.id;
  }
  /// "dispatch.hpp:123".
  [[nodiscard]] const std::string& name(uint16_t id) const { return names_[id]; }
  /// A name for what has no source line: a step of the host.
  [[nodiscard]] uint16_t named(const std::string& name) {
    for (size_t i = 0; i < names_.size(); ++i)
      if (names_[i] == name) return static_cast<uint16_t>(i);
    if (names_.size() > 0xffff) return 0;
    names_.push_back(name);
    return static_cast<uint16_t>(names_.size() - 1);
  }

 private:
  struct Entry {
    uintptr_t key = 0;
    uint16_t id = 0;
  };
  uint16_t look_up(Site site) {
    std::string file = site.file_name();
    file.erase(0, file.rfind('/') + 1);
    return named(file + ":" + std::to_string(site.line()));
  }
  std::array<Entry, 512> cache_{};
  std::vector<std::string> names_;
};

}  // namespace deepep::emu
