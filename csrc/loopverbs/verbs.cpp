// The functions of libibverbs that NVSHMEM's IBRC transport looks up: one device, one port, reliable
// connections.
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "loopverbs/gpu.hpp"
#include "loopverbs/nic.hpp"
#include "loopverbs/settings.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace loopverbs {
namespace {

template <class T>
T* zeroed() {
  return static_cast<T*>(calloc(1, sizeof(T)));
}

int post_send(abi::Qp* handle, abi::SendRequest* request, abi::SendRequest** bad) {
  for (; request != nullptr; request = request->next) {
    if (!Nic::instance().post(reinterpret_cast<QueuePair*>(handle), *request)) {
      *bad = request;
      return EINVAL;
    }
  }
  return 0;
}

int post_srq_recv(abi::Srq* handle, abi::ReceiveRequest* request, abi::ReceiveRequest** /*bad*/) {
  ReceiveQueue* queue = reinterpret_cast<ReceiveQueue*>(handle);
  const std::lock_guard<std::mutex> guard(queue->lock);
  for (; request != nullptr; request = request->next) queue->posted.emplace_back(request->id, request->sges[0]);
  return 0;
}

int poll_cq(abi::Cq* handle, int most, abi::Completion* completions) {
  CompletionQueue* queue = reinterpret_cast<CompletionQueue*>(handle);
  const std::lock_guard<std::mutex> guard(queue->lock);
  int n = 0;
  for (; n < most && !queue->done.empty(); ++n) {
    completions[n] = queue->done.front();
    queue->done.pop_front();
  }
  return n;
}

abi::Mr* add_region(abi::Pd* pd, void* address, size_t length, uint64_t iova) {
  abi::Mr* mr = zeroed<abi::Mr>();
  mr->context = pd->context;
  mr->pd = pd;
  mr->address = address;
  mr->length = length;
  mr->lkey = mr->rkey = mr->handle = Nic::instance().add_region(address, length, iova);
  return mr;
}

abi::Device the_device{};
abi::Device* the_list[2] = {&the_device, nullptr};

}  // namespace
}  // namespace loopverbs

using namespace loopverbs;

EXPORTED int ibv_fork_init() { return 0; }
EXPORTED abi::Device** ibv_get_device_list(int* count) {
  strcpy(the_device.name, "loop0");
  strcpy(the_device.dev_name, "uverbs0");
  the_device.node_type = abi::kNodeCa;
  the_device.transport_type = abi::kTransportIb;
  if (count != nullptr) *count = 1;
  return the_list;
}
EXPORTED void ibv_free_device_list(abi::Device** /*list*/) {}
EXPORTED const char* ibv_get_device_name(abi::Device* device) { return device->name; }
EXPORTED abi::Context* ibv_open_device(abi::Device* device) {
  abi::Context* context = zeroed<abi::Context>();
  context->device = device;
  context->post_send = post_send;
  context->post_srq_recv = post_srq_recv;
  context->poll_cq = poll_cq;
  context->num_comp_vectors = 1;
  Nic::instance();
  Gpu::instance().adopt();
  return context;
}
EXPORTED int ibv_close_device(abi::Context* context) {
  free(context);
  return 0;
}
EXPORTED int ibv_query_device(abi::Context* /*context*/, abi::DeviceAttributes* attributes) {
  *attributes = abi::DeviceAttributes{};
  attributes->num_ports = 1;
  attributes->max_qp = attributes->max_cq = attributes->max_srq = 65535;
  attributes->max_qp_wr = 1 << 16;
  attributes->max_cqe = attributes->max_mr = 1 << 20;
  attributes->max_mr_size = UINT64_MAX;
  attributes->max_qp_rd_atom = attributes->max_qp_init_rd_atom = 16;
  attributes->max_sge = 16;
  attributes->atomic_capability = abi::kAtomicHca;
  return 0;
}
EXPORTED int ibv_query_port(abi::Context* /*context*/, uint8_t /*port*/, abi::PortAttributes* attributes) {
  // Up to `flags`: older callers have no more.
  memset(attributes, 0, offsetof(abi::PortAttributes, flags));
  attributes->state = abi::kPortActive;
  attributes->max_mtu = attributes->active_mtu = abi::kMtu4096;
  attributes->gid_table_length = 1;
  attributes->max_message = 1u << 30;
  attributes->pkey_table_length = 1;
  const bool roce = setting("LOOPVERBS_ROCE", 0) != 0;  // then there is no LID, and peers have GIDs
  attributes->lid = static_cast<uint16_t>(roce ? 0 : Nic::instance().self() + 1);
  attributes->sm_lid = roce ? 0 : 1;
  attributes->active_width = 2;
  attributes->active_speed = 64;
  attributes->phys_state = 5;
  attributes->link_layer = roce ? abi::kLinkEthernet : abi::kLinkInfiniband;
  return 0;
}
EXPORTED int ibv_query_gid(abi::Context* /*context*/, uint8_t /*port*/, int /*index*/, uint8_t* gid) {
  memset(gid, 0, 16);
  gid[0] = 0xfe, gid[1] = 0x80, gid[15] = static_cast<uint8_t>(Nic::instance().self() + 1);
  return 0;
}
EXPORTED abi::Pd* ibv_alloc_pd(abi::Context* context) {
  abi::Pd* pd = zeroed<abi::Pd>();
  pd->context = context;
  return pd;
}
EXPORTED int ibv_dealloc_pd(abi::Pd* pd) {
  free(pd);
  return 0;
}
EXPORTED abi::Mr* ibv_reg_mr(abi::Pd* pd, void* address, size_t length, int /*access*/) {
  return add_region(pd, address, length, reinterpret_cast<uint64_t>(address));
}
EXPORTED abi::Mr* ibv_reg_mr_iova(abi::Pd* pd, void* address, size_t length, uint64_t iova, int /*access*/) {
  return add_region(pd, address, length, iova);
}
/// NVSHMEM names the memory by `iova`, its own address: the file descriptor is not needed here.
EXPORTED abi::Mr* ibv_reg_dmabuf_mr(abi::Pd* pd, uint64_t /*offset*/, size_t length, uint64_t iova, int /*fd*/,
                                    int /*access*/) {
  return add_region(pd, reinterpret_cast<void*>(iova), length, iova);
}
EXPORTED int ibv_dereg_mr(abi::Mr* mr) {
  Nic::instance().remove_region(mr->lkey);
  free(mr);
  return 0;
}
EXPORTED abi::Cq* ibv_create_cq(abi::Context* context, int cqe, void* cq_context, void* /*channel*/,
                                int /*vector*/) {
  CompletionQueue* queue = new CompletionQueue{};
  queue->handle.context = context;
  queue->handle.cq_context = cq_context;
  queue->handle.cqe = cqe;
  return &queue->handle;
}
EXPORTED int ibv_destroy_cq(abi::Cq* /*queue*/) { return 0; }  // the NIC's thread may still complete into it
EXPORTED abi::Srq* ibv_create_srq(abi::Pd* pd, void* /*init*/) {
  ReceiveQueue* queue = new ReceiveQueue{};
  queue->handle.context = pd->context;
  queue->handle.pd = pd;
  return &queue->handle;
}
EXPORTED int ibv_destroy_srq(abi::Srq* /*queue*/) { return 0; }
EXPORTED abi::Qp* ibv_create_qp(abi::Pd* pd, abi::QpInit* init) {
  if (init->type != abi::kTypeRc) {
    errno = EOPNOTSUPP;
    return nullptr;
  }
  QueuePair* qp = new QueuePair{};
  qp->handle.context = pd->context;
  qp->handle.pd = pd;
  qp->handle.send_cq = init->send_cq;
  qp->handle.recv_cq = init->recv_cq;
  qp->handle.srq = init->srq;
  qp->handle.type = init->type;
  Nic::instance().add(qp);
  return &qp->handle;
}
EXPORTED int ibv_modify_qp(abi::Qp* handle, abi::QpChange* change, int mask) {
  QueuePair* qp = reinterpret_cast<QueuePair*>(handle);
  if ((mask & abi::kMaskPeer) != 0) Nic::instance().set_peer(qp, change->peer_number);
  if ((mask & abi::kMaskRoute) != 0) {
    Nic::instance().note_lanes(qp, change->service_level, change->traffic_class);
  }
  if ((mask & abi::kMaskState) != 0) {
    handle->state = change->state;
    if (change->state == abi::kReadyToSend) Nic::instance().connect(qp);
  }
  return 0;
}
EXPORTED int ibv_destroy_qp(abi::Qp* handle) {
  Nic::instance().disconnect(reinterpret_cast<QueuePair*>(handle));
  return 0;
}
EXPORTED void* ibv_create_ah(abi::Pd* /*pd*/, void* /*attributes*/) { return nullptr; }
EXPORTED int ibv_destroy_ah(void* /*handle*/) { return 0; }
