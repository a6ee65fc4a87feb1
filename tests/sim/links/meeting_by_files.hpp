// Ranks of a test that tell each other a few bytes: by files in a folder that all of them have.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

class MeetingByFiles {
 public:
  MeetingByFiles(std::string folder, int rank, int ranks)
      : folder_(std::move(folder)), rank_(rank), ranks_(ranks) {}

  /// Every rank's bytes, by rank, as many from each. All ranks call it, in one order.
  std::vector<std::byte> gather(const void* mine, size_t bytes) {
    const int step = steps_++;
    const std::string own = name(step, rank_);
    {
      std::ofstream file(own + ".part", std::ios::binary);
      file.write(static_cast<const char*>(mine), static_cast<std::streamsize>(bytes));
    }
    std::filesystem::rename(own + ".part", own);  // whole, or not there
    std::vector<std::byte> all(bytes * static_cast<size_t>(ranks_));
    for (int from = 0; from < ranks_; ++from) {
      char* to = reinterpret_cast<char*>(all.data()) + bytes * static_cast<size_t>(from);
      while (true) {
        std::ifstream file(name(step, from), std::ios::binary);
        if (file && (bytes == 0 || file.read(to, static_cast<std::streamsize>(bytes)))) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    return all;
  }
  void barrier() { gather(nullptr, 0); }

 private:
  [[nodiscard]] std::string name(int step, int rank) const {
    return folder_ + "/" + std::to_string(step) + "." + std::to_string(rank);
  }

  std::string folder_;
  int rank_, ranks_;
  int steps_ = 0;
};
