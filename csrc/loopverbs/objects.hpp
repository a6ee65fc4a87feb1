// What verbs hand out, with what is behind it; a handle is the first member.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "loopverbs/abi.hpp"

namespace loopverbs {

using Clock = std::chrono::steady_clock;

/// Registered memory.
struct Region {
  uint64_t address;  // as peers call it
  uint64_t length;
  uint64_t shift;  // where it lies here, less `address`
  bool on_device;
};

struct CompletionQueue {
  abi::Cq handle;
  std::mutex lock;
  std::deque<abi::Completion> done;
};

struct ReceiveQueue {
  abi::Srq handle;
  std::mutex lock;
  std::deque<std::pair<uint64_t, abi::Sge>> posted;
};

struct WorkRequest {
  abi::SendRequest posted;
  std::vector<abi::Sge> sges;
  std::vector<std::byte> carried;  // inline data
  uint64_t length = 0, number = 0, sent = 0, answered = 0;
  Clock::time_point not_before;
};

struct QueuePair {
  abi::Qp handle;
  std::mutex lock;
  std::deque<WorkRequest> waiting;             // posted, not all on the wire
  std::map<uint64_t, WorkRequest> unanswered;  // on the wire; touched by the NIC's thread alone
  uint32_t peer = 0;
  bool connected = false;
  uint64_t numbers = 0;
};

/// How much of a write has come: pieces that were held back and have not landed, whether the last has come.
struct Arrival {
  uint64_t held = 0;
  bool has_last = false;
  bool good = true;
};

/// A piece of a write that has arrived and not landed.
struct Held {
  uint32_t from_qp, to_qp;
  uint64_t address;
  uint32_t rkey;
  std::vector<std::byte> bytes;
  Clock::time_point until;
  uint64_t request;
};

}  // namespace loopverbs
