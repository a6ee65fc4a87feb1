// A rank of a test of the wire, on verbs alone: rank 0 writes to rank 1 and signals, for so many rounds.
//
//     verbs_probe FOLDER ROUNDS BYTES add|set|completion
//
// Ranks tell each other numbers by files in FOLDER. Rank 1 counts, when a signal is there, words of that round
// that are not; prints "wrong N". Ends with status 3 if nothing came for VERBS_PROBE_SECONDS, or if a request
// failed. "completion": no signal; rank 0 says by a file that its write was completed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "loopverbs/abi.hpp"
#include "meeting_by_files.hpp"

using namespace loopverbs;
extern "C" {
abi::Device** ibv_get_device_list(int*);
abi::Context* ibv_open_device(abi::Device*);
abi::Pd* ibv_alloc_pd(abi::Context*);
abi::Mr* ibv_reg_mr(abi::Pd*, void*, size_t, int);
abi::Cq* ibv_create_cq(abi::Context*, int, void*, void*, int);
abi::Srq* ibv_create_srq(abi::Pd*, void*);
abi::Qp* ibv_create_qp(abi::Pd*, abi::QpInit*);
int ibv_modify_qp(abi::Qp*, abi::QpChange*, int);
}

namespace {

using Clock = std::chrono::steady_clock;
/// For how long a rank waits for the other: VERBS_PROBE_SECONDS, else long enough for a busy machine.
const char* const kSeconds = std::getenv("VERBS_PROBE_SECONDS");
const auto kPatience = std::chrono::seconds(kSeconds != nullptr ? std::atoi(kSeconds) : 40);

struct Told {
  uint32_t qp;
  uint32_t rkey;
  uint64_t address;
};

struct Rank {
  abi::Context* context;
  abi::Cq* cq;
  abi::Qp* qp;
  abi::Mr* mr;
  std::vector<uint64_t> memory;  // data, then the signal, then where old values go
  Told peer;

  bool post(uint32_t opcode, size_t from, size_t to, size_t bytes, uint64_t operand) {
    abi::Sge sge{reinterpret_cast<uint64_t>(&memory[from]), static_cast<uint32_t>(bytes), mr->lkey};
    abi::SendRequest request{}, *bad = nullptr;
    request.sges = &sge;
    request.num_sges = 1;
    request.opcode = opcode;
    request.flags = abi::kSignaled;
    if (opcode == abi::kFetchAdd) {
      request.atomic = {peer.address + 8 * to, operand, 0, peer.rkey};
    } else {
      request.rdma = {peer.address + 8 * to, peer.rkey};
    }
    return context->post_send(qp, &request, &bad) == 0;
  }
  bool drain(int requests) {
    const auto end = Clock::now() + kPatience;
    while (requests > 0 && Clock::now() < end) {
      abi::Completion done[8];
      const int n = context->poll_cq(cq, 8, done);
      for (int i = 0; i < n; ++i) {
        if (done[i].status != abi::kSuccess) return false;
      }
      requests -= n;
      if (n == 0) std::this_thread::yield();  // the NICs' threads need the few cores of a test's machine
    }
    return requests == 0;
  }
  bool wait(size_t word, uint64_t value) {
    const auto end = Clock::now() + kPatience;
    while (__atomic_load_n(&memory[word], __ATOMIC_ACQUIRE) < value) {
      if (Clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }
};

}  // namespace

int main(int, char** argv) {
  const std::string folder = argv[1];
  const uint64_t rounds = strtoull(argv[2], nullptr, 10), words = strtoull(argv[3], nullptr, 10) / 8;
  const bool adds = std::string(argv[4]) == "add", completes = std::string(argv[4]) == "completion";
  const int rank = atoi(getenv("RANK"));
  const size_t signal = words, old = words + 1, value = words + 2;
  Rank self{};
  self.memory.assign(words + 3, 0);
  self.context = ibv_open_device(ibv_get_device_list(nullptr)[0]);
  abi::Pd* pd = ibv_alloc_pd(self.context);
  self.cq = ibv_create_cq(self.context, 64, nullptr, nullptr, 0);
  self.mr = ibv_reg_mr(pd, self.memory.data(), 8 * self.memory.size(), 0);
  abi::QpInit init{};
  init.send_cq = init.recv_cq = self.cq;
  init.srq = ibv_create_srq(pd, nullptr);
  init.type = abi::kTypeRc;
  self.qp = ibv_create_qp(pd, &init);
  const Told mine{self.qp->number, self.mr->rkey, reinterpret_cast<uint64_t>(self.mr->address)};
  MeetingByFiles meeting(folder, rank, 2);
  const std::vector<std::byte> told = meeting.gather(&mine, sizeof mine);
  memcpy(&self.peer, told.data() + (1 - rank) * static_cast<int>(sizeof mine), sizeof self.peer);
  abi::QpChange change{};
  change.peer_number = self.peer.qp;
  change.state = abi::kReadyToSend;
  ibv_modify_qp(self.qp, &change, abi::kMaskPeer | abi::kMaskState);

  uint64_t wrong = 0;
  for (uint64_t round = 1; round <= rounds; ++round) {
    const auto count_wrong = [&] {
      for (size_t i = 0; i < words; ++i) wrong += self.memory[i] != (round << 32 | i);
    };
    if (rank == 0) {
      for (size_t i = 0; i < words; ++i) self.memory[i] = round << 32 | i;
      self.memory[value] = round;
      bool good = self.post(abi::kRdmaWrite, 0, 0, 8 * words, 0);
      if (completes) {
        if (!good || !self.drain(1)) return 3;
        meeting.barrier();
        meeting.barrier();
        continue;
      }
      good = good && (adds ? self.post(abi::kFetchAdd, old, signal, 8, 1)
                           : self.post(abi::kRdmaWrite, value, signal, 8, 0));
      if (!good || !self.drain(2) || !self.wait(signal, round)) return 3;  // the other signals back
    } else if (completes) {
      meeting.barrier();
      count_wrong();
      meeting.barrier();
    } else {
      if (!self.wait(signal, round)) return 3;
      count_wrong();
      if (!self.post(abi::kFetchAdd, old, signal, 8, 1) || !self.drain(1)) return 3;
    }
  }
  if (rank == 1) std::printf("wrong %lu\n", wrong);
  return 0;
}
