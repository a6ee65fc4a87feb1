// A process's NIC: a thread that takes what was posted, reads local memory, passes records through shared
// rings, and, as the target, writes its own memory and acknowledges. No process maps another's memory.
//
// It promises what a real one promises, and on demand no more:
//   - records of one queue pair arrive in order; queue pairs know nothing of each other, are served at random
//   - LOOPVERBS_DELAY_US: each work request waits a while, up to this, before it is looked at
//   - LOOPVERBS_WEAK=1: as with adaptive routing, a plain write may land behind a later plain write of its own
//     queue pair; an atomic or a send never passes a write
//   - LOOPVERBS_STOP_AFTER: the NIC falls silent after so many work requests (a node that died)
//   - LOOPVERBS_SEED decides all that is random
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "loopverbs/hub.hpp"
#include "loopverbs/objects.hpp"

namespace loopverbs {

class Nic {
 public:
  /// The process's only one.
  static Nic& instance();

  [[nodiscard]] int self() const { return self_; }
  /// A key for memory that peers call `iova`.
  uint32_t add_region(void* address, uint64_t length, uint64_t iova);
  void remove_region(uint32_t key);
  /// Gives a new queue pair its number.
  void add(QueuePair* qp);
  void set_peer(QueuePair* qp, uint32_t number);
  /// Notes the lanes that the queue pair, whose peer is known, asks for: all traffic takes one way here.
  void note_lanes(const QueuePair* qp, uint8_t service_level, uint8_t traffic_class);
  void connect(QueuePair* qp);
  void disconnect(QueuePair* qp);
  /// False: the queue pair is not connected.
  [[nodiscard]] bool post(QueuePair* qp, const abi::SendRequest& posted);

 private:
  Nic();
  void run();
  [[nodiscard]] bool silent() const { return stop_after_ > 0 && requests_ >= stop_after_; }
  [[nodiscard]] uint64_t draw(uint64_t below) { return below > 0 ? random_() % below : 0; }
  [[nodiscard]] Ring& ring_to(uint32_t qp) { return hub_->rings[self_][qp >> 16]; }
  [[nodiscard]] Counters& counters_to(uint32_t qp) { return hub_->counters[self_][qp >> 16]; }
  [[nodiscard]] bool region_of(uint32_t key, uint64_t address, uint64_t length, Region& out);
  static void copy_out(std::byte* to, uint64_t from, uint64_t length, bool device);
  static void copy_in(uint64_t to, const std::byte* from, uint64_t length, bool device);

  // The source's side: source.cpp.
  bool serve(QueuePair* qp);
  static void describe(const WorkRequest& request, Record& record);
  [[nodiscard]] bool gather(const WorkRequest& request, uint64_t offset, uint64_t length, std::byte* to);
  [[nodiscard]] bool scatter(const WorkRequest& request, uint64_t offset, const std::byte* from,
                             uint64_t length);
  static void complete(QueuePair* qp, const WorkRequest& request, abi::Status status);
  void settle(QueuePair* qp, Record& record);

  // The target's side: target.cpp. `take` and what it calls: false means not now.
  bool take(Record& record);
  bool take_write(Record& record, QueuePair* qp);
  bool take_atomic(Record& record);
  bool take_read(Record& record);
  bool receive(Record& record, QueuePair* qp);
  bool reply(Record& to, const std::byte* value, uint64_t from, uint64_t length, bool device);
  bool land(uint64_t address, uint32_t rkey, const std::byte* from, uint64_t length);
  bool land_held(uint32_t from_qp);
  bool land_due();
  void land(const Held& held);
  void acknowledge(uint32_t to_qp, uint32_t from_qp, uint64_t request);
  void answer(uint32_t to_qp, uint32_t from_qp, uint64_t request, bool good);
  bool send_answers();
  [[nodiscard]] QueuePair* qp_of(uint32_t number);

  Hub* hub_;
  int self_;
  uint64_t delay_us_, stop_after_;
  bool weak_;
  std::mt19937_64 random_;
  std::mutex lock_;  // of the tables
  std::vector<QueuePair*> qps_;
  std::map<uint32_t, Region> regions_;
  uint32_t next_key_ = 1;
  bool pinned_[kMaxProcesses] = {};
  std::atomic<bool> started_{false};
  std::deque<Held> held_;
  std::map<std::pair<uint32_t, uint64_t>, Arrival> arrivals_;  // by queue pair and request, until answered
  std::deque<Record> answers_;  // acknowledgements that found no room yet: one a request at most
  uint64_t requests_ = 0;
};

}  // namespace loopverbs
