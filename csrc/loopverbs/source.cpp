// The source's side of a NIC: what was posted goes onto the wire, and is completed when the target answers.
#include <algorithm>
#include <cstring>

#include "loopverbs/nic.hpp"
#include "loopverbs/settings.hpp"

namespace loopverbs {

namespace {

bool carries_data(uint32_t opcode) {
  return opcode == abi::kRdmaWrite || opcode == abi::kRdmaWriteImm || opcode == abi::kSend;
}

}  // namespace

void Nic::describe(const WorkRequest& request, Record& record) {
  const abi::SendRequest& posted = request.posted;
  switch (posted.opcode) {
    case abi::kRdmaWrite:
    case abi::kRdmaWriteImm:
      record.kind = Kind::kWrite;
      record.address = posted.rdma.address + request.sent;
      record.rkey = posted.rdma.rkey;
      record.imm = posted.imm;
      record.has_imm = posted.opcode == abi::kRdmaWriteImm ? 1 : 0;
      break;
    case abi::kSend:
      record.kind = Kind::kSend;
      break;
    case abi::kRdmaRead:
      record.kind = Kind::kRead;
      record.address = posted.rdma.address;
      record.rkey = posted.rdma.rkey;
      record.first = request.length;
      break;
    case abi::kFetchAdd:
    case abi::kCompareSwap:
      record.kind = posted.opcode == abi::kFetchAdd ? Kind::kAdd : Kind::kSwap;
      record.address = posted.atomic.address;
      record.rkey = posted.atomic.rkey;
      record.first = posted.atomic.compare_add;
      record.second = posted.atomic.swap;
      break;
    default:
      die("work request with opcode %u", posted.opcode);
  }
}

/// Puts a piece of the oldest request on the wire, if there is room for it. True if something moved.
bool Nic::serve(QueuePair* qp) {
  std::unique_lock<std::mutex> guard(qp->lock);
  if (qp->waiting.empty() || !qp->connected || silent()) return false;
  WorkRequest& request = qp->waiting.front();
  if (Clock::now() < request.not_before) return false;
  guard.unlock();  // a deque: the front stays where it is while others are pushed behind it
  const uint64_t left = carries_data(request.posted.opcode) ? request.length - request.sent : 0;
  const uint32_t part = static_cast<uint32_t>(std::min<uint64_t>(left, kFragment));
  Ring& ring = ring_to(qp->peer);
  Record* record = ring.room(part);
  if (record == nullptr) return false;
  *record = Record{};
  record->payload = part;
  record->to_qp = qp->peer;
  record->from_qp = qp->handle.number;
  record->request = request.number;
  record->last = part == left ? 1 : 0;
  describe(request, *record);
  const bool readable = part == 0 || gather(request, request.sent, part, record->data());
  const bool last = record->last != 0 || !readable;
  request.sent += part;
  if (readable) {
    Counters& counters = counters_to(qp->peer);
    counters.requests += last ? 1 : 0;
    counters.writes += record->kind == Kind::kWrite ? 1 : 0;
    counters.bytes += record->kind == Kind::kWrite ? part : 0;
    counters.atomics += record->kind == Kind::kAdd || record->kind == Kind::kSwap ? 1 : 0;
    ring.publish(record);
  }
  if (last) {
    ++requests_;
    guard.lock();
    WorkRequest moved = std::move(qp->waiting.front());
    qp->waiting.pop_front();
    guard.unlock();
    if (readable) {
      const uint64_t number = moved.number;
      qp->unanswered.emplace(number, std::move(moved));
    } else {
      complete(qp, moved, abi::kLocalProtection);
    }
  }
  return true;
}

/// `length` bytes of what a request names, from `offset` on.
bool Nic::gather(const WorkRequest& request, uint64_t offset, uint64_t length, std::byte* to) {
  if (!request.carried.empty()) {
    memcpy(to, request.carried.data() + offset, length);
    return true;
  }
  for (const abi::Sge& sge : request.sges) {
    if (offset >= sge.length) {
      offset -= sge.length;
      continue;
    }
    const uint64_t part = std::min<uint64_t>(length, sge.length - offset);
    Region region;
    if (!region_of(sge.lkey, sge.address + offset, part, region)) return false;
    copy_out(to, sge.address + offset + region.shift, part, region.on_device);
    to += part, length -= part, offset = 0;
    if (length == 0) return true;
  }
  return length == 0;
}

bool Nic::scatter(const WorkRequest& request, uint64_t offset, const std::byte* from, uint64_t length) {
  for (const abi::Sge& sge : request.sges) {
    if (offset >= sge.length) {
      offset -= sge.length;
      continue;
    }
    Region region;
    if (!region_of(sge.lkey, sge.address + offset, length, region)) return false;
    copy_in(sge.address + offset + region.shift, from, length, region.on_device);
    return true;
  }
  return length == 0;
}

void Nic::complete(QueuePair* qp, const WorkRequest& request, abi::Status status) {
  if ((request.posted.flags & abi::kSignaled) == 0 && status == abi::kSuccess) return;
  abi::Completion completion{};
  completion.id = request.posted.id;
  completion.status = status;
  completion.qp_number = qp->handle.number;
  completion.length = static_cast<uint32_t>(request.length);
  CompletionQueue* queue = reinterpret_cast<CompletionQueue*>(qp->handle.send_cq);
  const std::lock_guard<std::mutex> guard(queue->lock);
  queue->done.push_back(completion);
}

/// The target has answered: an acknowledgement, or what was read.
void Nic::settle(QueuePair* qp, Record& record) {
  const auto at = qp->unanswered.find(record.request);
  if (at == qp->unanswered.end()) die("an answer to no request");
  WorkRequest& request = at->second;
  if (record.kind == Kind::kReply) {
    if (!scatter(request, record.address, record.data(), record.payload)) {
      die("a reply to memory that is not registered");
    }
    if (record.last == 0) return;
  }
  complete(qp, request, record.kind == Kind::kNak ? abi::kRemoteAccess : abi::kSuccess);
  qp->unanswered.erase(at);
}

}  // namespace loopverbs
