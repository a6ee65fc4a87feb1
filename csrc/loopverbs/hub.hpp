// What processes of a session share: a ring of records for each ordered pair of them, and counts of what
// passed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace loopverbs {

inline constexpr int kMaxProcesses = 16;
inline constexpr uint64_t kRingBytes = 8 << 20;
/// Longer requests are sent in pieces.
inline constexpr uint32_t kFragment = 1 << 20;

enum class Kind : uint32_t { kWrite, kSend, kAdd, kSwap, kRead, kReply, kAck, kNak, kSkip };

struct alignas(64) Record {
  Kind kind;
  uint32_t payload;  // bytes behind the record
  uint32_t to_qp, from_qp;
  uint64_t address;  // at the target; of a reply: the offset in what was asked for
  uint32_t rkey;
  uint32_t last;           // of its work request
  uint64_t request;        // number of the work request at its source
  uint64_t first, second;  // operands
  uint32_t imm, has_imm;

  [[nodiscard]] std::byte* data() { return reinterpret_cast<std::byte*>(this + 1); }
};
static_assert(sizeof(Record) == 64);

/// One writer, one reader. Records lie whole: one that does not fit before the end is preceded by a skip.
struct Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(4096) std::byte bytes[kRingBytes];

  /// Where the next record goes, or null: there is no room for it now.
  [[nodiscard]] Record* room(uint32_t payload);
  void publish(const Record* record);
  /// The oldest record that was not released, or null.
  [[nodiscard]] Record* next();
  void release(const Record* record);
};

/// Read by tests and by `python -m deepep wire`, from the file: 8-byte words, in this order.
struct Counters {
  std::atomic<uint64_t> requests;  // work requests sent
  std::atomic<uint64_t> writes;    // pieces of RDMA writes
  std::atomic<uint64_t> bytes;     // that they carried
  std::atomic<uint64_t> atomics;
  std::atomic<uint64_t> late;  // writes that later ones overtook
  std::atomic<uint64_t> service_level;  // of the last queue pair that was connected
  std::atomic<uint64_t> traffic_class;
  std::atomic<uint64_t> unused;
};
static_assert(sizeof(Counters) == 64);

struct Hub {
  std::atomic<uint64_t> processes;
  uint64_t unused[7];
  Counters counters[kMaxProcesses][kMaxProcesses];  // [from][to]
  Ring rings[kMaxProcesses][kMaxProcesses];         // [from][to]

  /// The session's file, mapped; the file is made if it is not there.
  [[nodiscard]] static Hub* open();
};
static_assert(offsetof(Hub, counters) == 64);

}  // namespace loopverbs
