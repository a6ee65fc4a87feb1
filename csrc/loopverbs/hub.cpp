#include "loopverbs/hub.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "loopverbs/settings.hpp"

namespace loopverbs {

namespace {

uint64_t padded(uint32_t payload) { return (payload + uint64_t{63}) & ~uint64_t{63}; }

}  // namespace

Record* Ring::room(uint32_t payload) {
  const uint64_t need = sizeof(Record) + padded(payload);
  uint64_t at = written.load(std::memory_order_relaxed);
  const uint64_t end = kRingBytes - at % kRingBytes, skip = end < need ? end : 0;
  if (at + skip + need - read.load(std::memory_order_acquire) > kRingBytes) return nullptr;
  if (skip > 0) {
    Record* gap = reinterpret_cast<Record*>(bytes + at % kRingBytes);
    gap->kind = Kind::kSkip;
    gap->payload = static_cast<uint32_t>(skip - sizeof(Record));
    at += skip;
    written.store(at, std::memory_order_release);
  }
  return reinterpret_cast<Record*>(bytes + at % kRingBytes);
}

void Ring::publish(const Record* record) {
  const uint64_t at = written.load(std::memory_order_relaxed);
  written.store(at + sizeof(Record) + padded(record->payload), std::memory_order_release);
}

Record* Ring::next() {
  const uint64_t at = read.load(std::memory_order_relaxed);
  if (at == written.load(std::memory_order_acquire)) return nullptr;
  return reinterpret_cast<Record*>(bytes + at % kRingBytes);
}

void Ring::release(const Record* record) {
  const uint64_t payload = record->kind == Kind::kSkip ? record->payload : padded(record->payload);
  read.store(read.load(std::memory_order_relaxed) + sizeof(Record) + payload, std::memory_order_release);
}

Hub* Hub::open() {
  const char* session = getenv("LOOPVERBS_SESSION");
  const std::string path = std::string("/dev/shm/loopverbs.") + (session != nullptr ? session : "0");
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Hub)) != 0) die("cannot open %s", path.c_str());
  void* memory = mmap(nullptr, sizeof(Hub), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) die("cannot map %s", path.c_str());
  close(file);
  return static_cast<Hub*>(memory);
}

}  // namespace loopverbs
