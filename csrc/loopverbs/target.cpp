// The target's side of a NIC: what arrives lands in registered memory, in the order that was promised, and is
// acknowledged.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "loopverbs/nic.hpp"
#include "loopverbs/settings.hpp"

namespace loopverbs {

bool Nic::take(Record& record) {
  if (record.kind == Kind::kSkip) return true;
  QueuePair* qp = qp_of(record.to_qp);
  if (qp == nullptr) die("a record for queue pair %#x, which is not here", record.to_qp);
  switch (record.kind) {
    case Kind::kWrite:
      return take_write(record, qp);
    case Kind::kSend:
      land_held(record.from_qp);
      if (!receive(record, qp)) return false;
      answer(record.from_qp, record.to_qp, record.request, true);
      return true;
    case Kind::kAdd:
    case Kind::kSwap:
      land_held(record.from_qp);
      return take_atomic(record);
    case Kind::kRead:
      land_held(record.from_qp);
      return take_read(record);
    case Kind::kReply:
    case Kind::kAck:
    case Kind::kNak:
      settle(qp, record);
      return true;
    default:
      die("record of kind %u", static_cast<unsigned>(record.kind));
  }
}

/// In weak order a piece of a write may be held back: later writes of its queue pair then land before it.
bool Nic::take_write(Record& record, QueuePair* qp) {
  const bool is_held = weak_ && record.has_imm == 0 && draw(2) == 1;
  const bool notifies = record.has_imm != 0 && record.last != 0;
  if (notifies) {
    land_held(record.from_qp);
    ReceiveQueue* queue = reinterpret_cast<ReceiveQueue*>(qp->handle.srq);
    const std::lock_guard<std::mutex> guard(queue->lock);
    if (queue->posted.empty()) return false;
  }
  Arrival& arrival = arrivals_[{record.from_qp, record.request}];
  arrival.has_last |= record.last != 0;
  if (is_held) {
    const auto wait = std::chrono::microseconds(draw(delay_us_));
    held_.push_back(Held{.from_qp = record.from_qp,
                         .to_qp = record.to_qp,
                         .address = record.address,
                         .rkey = record.rkey,
                         .bytes = {record.data(), record.data() + record.payload},
                         .until = Clock::now() + wait,
                         .request = record.request});
    ++arrival.held;
    ++hub_->counters[record.from_qp >> 16][self_].late;
    return true;
  }
  const bool good = land(record.address, record.rkey, record.data(), record.payload);
  arrival.good &= good;
  if (good && notifies && !receive(record, qp)) die("a receive was taken by another thread");
  acknowledge(record.from_qp, record.to_qp, record.request);
  return true;
}

/// Once all pieces of a write have landed: a completion promises no less.
void Nic::acknowledge(uint32_t to_qp, uint32_t from_qp, uint64_t request) {
  const auto at = arrivals_.find({to_qp, request});
  if (!at->second.has_last || at->second.held > 0) return;
  answer(to_qp, from_qp, request, at->second.good);
  arrivals_.erase(at);
}

bool Nic::take_atomic(Record& record) {
  Region region;
  if (record.address % 8 != 0 || !region_of(record.rkey, record.address, 8, region)) {
    answer(record.from_qp, record.to_qp, record.request, false);
    return true;
  }
  if (ring_to(record.from_qp).room(8) == nullptr) return false;  // the old value goes back in any case
  uint64_t old = 0;
  const uint64_t at = record.address + region.shift;
  copy_out(reinterpret_cast<std::byte*>(&old), at, 8, region.on_device);
  const bool adds = record.kind == Kind::kAdd;
  const uint64_t value = adds ? old + record.first : (old == record.first ? record.second : old);
  copy_in(at, reinterpret_cast<const std::byte*>(&value), 8, region.on_device);
  return reply(record, reinterpret_cast<const std::byte*>(&old), 0, 8, false);
}

/// The record counts in `second` what has been answered, so that a full ring can be tried again.
bool Nic::take_read(Record& record) {
  Region region;
  if (!region_of(record.rkey, record.address, record.first, region)) {
    answer(record.from_qp, record.to_qp, record.request, false);
    return true;
  }
  while (record.second < record.first) {
    const uint64_t part = std::min<uint64_t>(record.first - record.second, kFragment);
    if (!reply(record, nullptr, record.address + region.shift + record.second, part, region.on_device)) {
      return false;
    }
  }
  return true;
}

bool Nic::reply(Record& to, const std::byte* value, uint64_t from, uint64_t length, bool device) {
  Ring& ring = ring_to(to.from_qp);
  Record* record = ring.room(static_cast<uint32_t>(length));
  if (record == nullptr) return false;
  *record = Record{};
  record->kind = Kind::kReply;
  record->payload = static_cast<uint32_t>(length);
  record->to_qp = to.from_qp;
  record->from_qp = to.to_qp;
  record->request = to.request;
  if (value != nullptr) {
    memcpy(record->data(), value, length);
    record->last = 1;
  } else {
    copy_out(record->data(), from, length, device);
    record->address = to.second;
    to.second += length;
    record->last = to.second == to.first ? 1 : 0;
  }
  ring.publish(record);
  return true;
}

/// Gives what arrived to the oldest receive that was posted; false: there is none, the sender tries again.
bool Nic::receive(Record& record, QueuePair* qp) {
  ReceiveQueue* queue = reinterpret_cast<ReceiveQueue*>(qp->handle.srq);
  std::pair<uint64_t, abi::Sge> slot;
  {
    const std::lock_guard<std::mutex> guard(queue->lock);
    if (queue->posted.empty()) return false;
    slot = queue->posted.front();
    queue->posted.pop_front();
  }
  const bool with_imm = record.has_imm != 0;
  if (!with_imm) memcpy(reinterpret_cast<void*>(slot.second.address), record.data(), record.payload);
  abi::Completion completion{};
  completion.id = slot.first;
  completion.status = abi::kSuccess;
  completion.opcode = with_imm ? abi::kReceivedImm : abi::kReceived;
  completion.qp_number = qp->handle.number;
  completion.length = record.payload;
  completion.imm = record.imm;
  completion.flags = with_imm ? abi::kWithImm : 0;
  CompletionQueue* done = reinterpret_cast<CompletionQueue*>(qp->handle.recv_cq);
  const std::lock_guard<std::mutex> guard(done->lock);
  done->done.push_back(completion);
  return true;
}

bool Nic::land(uint64_t address, uint32_t rkey, const std::byte* from, uint64_t length) {
  Region region;
  if (!region_of(rkey, address, length, region)) {
    fprintf(stderr, "loopverbs: write of %lu bytes to %#lx, rkey %u: not registered\n", length, address, rkey);
    return false;
  }
  copy_in(address + region.shift, from, length, region.on_device);
  return true;
}

void Nic::land(const Held& held) {
  Arrival& arrival = arrivals_[{held.from_qp, held.request}];
  arrival.good &= land(held.address, held.rkey, held.bytes.data(), held.bytes.size());
  --arrival.held;
  acknowledge(held.from_qp, held.to_qp, held.request);
}

/// All writes of a queue pair that were held back.
bool Nic::land_held(uint32_t from_qp) {
  const auto released = std::stable_partition(held_.begin(), held_.end(),
                                            [&](const Held& held) { return held.from_qp != from_qp; });
  const bool any = released != held_.end();
  std::for_each(released, held_.end(), [&](const Held& held) { land(held); });
  held_.erase(released, held_.end());
  return any;
}

/// Those whose time has come.
bool Nic::land_due() {
  const Clock::time_point now = Clock::now();
  const auto due = std::stable_partition(held_.begin(), held_.end(),
                                         [&](const Held& held) { return held.until > now; });
  const bool any = due != held_.end();
  std::for_each(due, held_.end(), [&](const Held& held) { land(held); });
  held_.erase(due, held_.end());
  return any;
}

void Nic::answer(uint32_t to_qp, uint32_t from_qp, uint64_t request, bool good) {
  Record record{};
  record.kind = good ? Kind::kAck : Kind::kNak;
  record.to_qp = to_qp;
  record.from_qp = from_qp;
  record.request = request;
  answers_.push_back(record);
}

bool Nic::send_answers() {
  bool moved = false;
  while (!answers_.empty()) {
    Ring& ring = ring_to(answers_.front().to_qp);
    Record* record = ring.room(0);
    if (record == nullptr) break;
    *record = answers_.front();
    ring.publish(record);
    answers_.pop_front();
    moved = true;
  }
  return moved;
}

QueuePair* Nic::qp_of(uint32_t number) {
  const std::lock_guard<std::mutex> guard(lock_);
  const uint32_t at = number & 0xffffu;
  return at < qps_.size() ? qps_[at] : nullptr;
}

}  // namespace loopverbs
