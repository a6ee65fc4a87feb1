#include "loopverbs/nic.hpp"

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "loopverbs/gpu.hpp"
#include "loopverbs/settings.hpp"

namespace loopverbs {

long setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text != nullptr ? atol(text) : otherwise;
}

void die(const char* format, ...) {
  va_list list;
  va_start(list, format);
  fputs("loopverbs: ", stderr);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
  va_end(list);
  abort();
}

Nic& Nic::instance() {
  static Nic* one = new Nic;  // lives to the end of the process: its thread does
  return *one;
}

Nic::Nic()
    : hub_(Hub::open()),
      delay_us_(static_cast<uint64_t>(setting("LOOPVERBS_DELAY_US", 0))),
      stop_after_(static_cast<uint64_t>(setting("LOOPVERBS_STOP_AFTER", 0))),
      weak_(setting("LOOPVERBS_WEAK", 0) != 0) {
  const long rank = setting("LOOPVERBS_RANK", -1);  // by number of arrival where nobody says
  self_ = static_cast<int>(rank >= 0 ? static_cast<uint64_t>(rank) : hub_->processes.fetch_add(1));
  if (self_ >= kMaxProcesses) die("process %d of a session; at most %d take part", self_, kMaxProcesses);
  uint64_t known = hub_->processes.load();
  while (known < static_cast<uint64_t>(self_) + 1 &&
         !hub_->processes.compare_exchange_weak(known, static_cast<uint64_t>(self_) + 1)) {
  }
  random_.seed(static_cast<uint64_t>(setting("LOOPVERBS_SEED", 1)) * 1000003u + static_cast<uint64_t>(self_));
}

uint32_t Nic::add_region(void* address, uint64_t length, uint64_t iova) {
  Gpu& gpu = Gpu::instance();
  const Region region{.address = iova,
                      .length = length,
                      .shift = reinterpret_cast<uint64_t>(address) - iova,
                      .on_device = gpu.owns(address)};
  if (region.on_device) gpu.adopt();
  const std::lock_guard<std::mutex> guard(lock_);
  regions_[next_key_] = region;
  return next_key_++;
}

void Nic::remove_region(uint32_t key) {
  const std::lock_guard<std::mutex> guard(lock_);
  regions_.erase(key);
}

void Nic::add(QueuePair* qp) {
  const std::lock_guard<std::mutex> guard(lock_);
  qp->handle.number = static_cast<uint32_t>(self_) << 16 | static_cast<uint32_t>(qps_.size());
  qps_.push_back(qp);
}

/// Rings are read and written by copy engines: pinned before any kernel runs, when queue pairs connect.
void Nic::set_peer(QueuePair* qp, uint32_t number) {
  qp->peer = number;
  const uint32_t process = number >> 16;
  if (process >= kMaxProcesses) die("queue pair %#x: there is no such process", number);
  if (!pinned_[process]) {
    Ring* both[2] = {&hub_->rings[self_][process], &hub_->rings[process][self_]};
    pinned_[process] = Gpu::instance().pin(both[0]->bytes, kRingBytes) &&
                       (both[0] == both[1] || Gpu::instance().pin(both[1]->bytes, kRingBytes));
  }
}

void Nic::note_lanes(const QueuePair* qp, uint8_t service_level, uint8_t traffic_class) {
  Counters& counters = counters_to(qp->peer);
  counters.service_level = service_level;
  counters.traffic_class = traffic_class;
}

void Nic::connect(QueuePair* qp) {
  {
    const std::lock_guard<std::mutex> guard(qp->lock);
    qp->connected = true;
  }
  if (!started_.exchange(true)) std::thread([this] { run(); }).detach();
}

void Nic::disconnect(QueuePair* qp) {
  const std::lock_guard<std::mutex> guard(qp->lock);
  qp->connected = false;  // peers' last acknowledgements may still come: it stays in the table
}

bool Nic::post(QueuePair* qp, const abi::SendRequest& posted) {
  WorkRequest request;
  request.posted = posted;
  request.sges.assign(posted.sges, posted.sges + posted.num_sges);
  for (const abi::Sge& sge : request.sges) {
    request.length += sge.length;
    if ((posted.flags & abi::kInline) != 0) {
      const std::byte* from = reinterpret_cast<const std::byte*>(sge.address);
      request.carried.insert(request.carried.end(), from, from + sge.length);
    }
  }
  const std::lock_guard<std::mutex> guard(qp->lock);
  if (!qp->connected) return false;
  request.number = qp->numbers++;
  if (delay_us_ > 0) {  // not drawn: the caller's thread has no part in the NIC's random numbers
    const uint64_t wait = (request.number * 2654435761u >> 7) % delay_us_;
    request.not_before = Clock::now() + std::chrono::microseconds(wait);
  }
  qp->waiting.push_back(std::move(request));
  return true;
}

bool Nic::region_of(uint32_t key, uint64_t address, uint64_t length, Region& out) {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto at = regions_.find(key);
  if (at == regions_.end()) return false;
  const Region& region = at->second;
  if (address < region.address || address + length > region.address + region.length) return false;
  out = region;
  return true;
}

void Nic::copy_out(std::byte* to, uint64_t from, uint64_t length, bool device) {
  if (device) {
    Gpu::instance().read(to, from, length);
  } else {
    memcpy(to, reinterpret_cast<const void*>(from), length);
  }
}

void Nic::copy_in(uint64_t to, const std::byte* from, uint64_t length, bool device) {
  if (device) {
    Gpu::instance().write(to, from, length);
  } else if (length == 8 && to % 8 == 0) {  // at once, behind all that was written before
    uint64_t value = 0;
    memcpy(&value, from, 8);
    reinterpret_cast<std::atomic<uint64_t>*>(to)->store(value, std::memory_order_release);
  } else {
    memcpy(reinterpret_cast<void*>(to), from, length);
  }
}

void Nic::run() {
  int idle = 0;
  std::vector<QueuePair*> all;
  while (true) {
    bool moved = false;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      all = qps_;
    }
    std::shuffle(all.begin(), all.end(), random_);
    for (QueuePair* qp : all) moved |= serve(qp);
    if (!silent()) {
      const int processes = static_cast<int>(std::min<uint64_t>(kMaxProcesses, hub_->processes.load()));
      for (int from = 0; from < processes; ++from) {
        Ring& ring = hub_->rings[from][self_];
        for (int n = 0; n < 64; ++n) {
          Record* record = ring.next();
          if (record == nullptr || !take(*record)) break;
          ring.release(record);
          moved = true;
        }
      }
      moved |= land_due();
      moved |= send_answers();
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 2000) {  // hosts of tests have few cores
      usleep(50);
    } else if (idle > 64) {
      sched_yield();
    } else {
      _mm_pause();
    }
  }
}

}  // namespace loopverbs
