// What NVSHMEM's IBRC transport sees of libibverbs: the structures of its stable ABI (x86-64), as far as they
// are read or written here. What nobody here touches is padding. The offsets were checked against rdma-core 44.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loopverbs::abi {

struct Context;
struct Qp;
struct Cq;
struct Srq;
struct SendRequest;
struct ReceiveRequest;
struct Completion;

struct Device {
  void* ops[2];
  int32_t node_type;
  int32_t transport_type;
  char name[64];
  char dev_name[64];
  char unused[512];
};
static_assert(sizeof(Device) == 664);

/// The data path is called through the context, by inline functions of verbs.h.
struct Context {
  Device* device;
  void* before_poll[11];
  int (*poll_cq)(Cq*, int, Completion*);
  void* before_receive[8];
  int (*post_srq_recv)(Srq*, ReceiveRequest*, ReceiveRequest**);
  void* before_send[4];
  int (*post_send)(Qp*, SendRequest*, SendRequest**);
  void* after_send[6];
  int32_t cmd_fd;
  int32_t async_fd;
  int32_t num_comp_vectors;
  char lock[44];
  void* abi_compat;  // null: there are no extended operations
};
static_assert(offsetof(Context, poll_cq) == 96 && offsetof(Context, post_srq_recv) == 168);
static_assert(offsetof(Context, post_send) == 208 && offsetof(Context, cmd_fd) == 264);
static_assert(offsetof(Context, abi_compat) == 320 && sizeof(Context) == 328);

struct Pd {
  Context* context;
  uint64_t handle;
};

struct Mr {
  Context* context;
  Pd* pd;
  void* address;
  size_t length;
  uint32_t handle;
  uint32_t lkey;
  uint32_t rkey;
};
static_assert(sizeof(Mr) == 48);

struct Cq {
  Context* context;
  void* channel;
  void* cq_context;
  uint32_t handle;
  int32_t cqe;
  char unused[96];
};
static_assert(sizeof(Cq) == 128);

struct Srq {
  Context* context;
  void* srq_context;
  Pd* pd;
  char unused[104];
};
static_assert(sizeof(Srq) == 128);

struct Qp {
  Context* context;
  void* qp_context;
  Pd* pd;
  Cq* send_cq;
  Cq* recv_cq;
  Srq* srq;
  uint32_t handle;
  uint32_t number;
  int32_t state;
  int32_t type;
  char unused[96];
};
static_assert(offsetof(Qp, number) == 52 && sizeof(Qp) == 160);

struct QpInit {
  void* qp_context;
  Cq* send_cq;
  Cq* recv_cq;
  Srq* srq;
  uint32_t capacities[5];
  int32_t type;
  int32_t signal_all;
};
static_assert(offsetof(QpInit, type) == 52);

struct QpChange {
  int32_t state;
  char unused[24];
  uint32_t peer_number;
  char before_route[46];
  uint8_t traffic_class;  // of routes that have a GID: RoCE's
  char before_level[3];
  uint8_t service_level;
  char more[61];
};
static_assert(offsetof(QpChange, peer_number) == 28 && sizeof(QpChange) == 144);
static_assert(offsetof(QpChange, traffic_class) == 78 && offsetof(QpChange, service_level) == 82);

struct Sge {
  uint64_t address;
  uint32_t length;
  uint32_t lkey;
};

struct SendRequest {
  struct Rdma {
    uint64_t address;
    uint32_t rkey;
  };
  struct Atomic {
    uint64_t address;
    uint64_t compare_add;
    uint64_t swap;
    uint32_t rkey;
  };

  uint64_t id;
  SendRequest* next;
  Sge* sges;
  int32_t num_sges;
  uint32_t opcode;
  uint32_t flags;
  uint32_t imm;
  union {
    Rdma rdma;
    Atomic atomic;
  };
  char unused[56];
};
static_assert(offsetof(SendRequest, rdma) == 40 && sizeof(SendRequest) == 128);

struct ReceiveRequest {
  uint64_t id;
  ReceiveRequest* next;
  Sge* sges;
  int32_t num_sges;
};

struct Completion {
  uint64_t id;
  uint32_t status;
  uint32_t opcode;
  uint32_t vendor_error;
  uint32_t length;
  uint32_t imm;
  uint32_t qp_number;
  uint32_t source_qp;
  uint32_t flags;
  uint64_t unused;
};
static_assert(sizeof(Completion) == 48);

struct DeviceAttributes {
  char firmware[64];
  char guids[16];
  uint64_t max_mr_size;
  char sizes[20];
  int32_t max_qp;
  int32_t max_qp_wr;
  uint32_t capabilities;
  int32_t max_sge;
  int32_t max_sge_rd;
  int32_t max_cq;
  int32_t max_cqe;
  int32_t max_mr;
  int32_t max_pd;
  int32_t max_qp_rd_atom;
  int32_t unused[2];
  int32_t max_qp_init_rd_atom;
  int32_t max_ee_init_rd_atom;
  int32_t atomic_capability;
  int32_t more[11];
  int32_t max_srq;
  char last[11];
  uint8_t num_ports;
};
static_assert(offsetof(DeviceAttributes, max_mr_size) == 80 && offsetof(DeviceAttributes, max_qp) == 108);
static_assert(offsetof(DeviceAttributes, max_qp_init_rd_atom) == 156);
static_assert(offsetof(DeviceAttributes, max_srq) == 212 && offsetof(DeviceAttributes, num_ports) == 227);

/// As old callers know it: 48 bytes. Nothing behind them is written.
struct PortAttributes {
  int32_t state;
  int32_t max_mtu;
  int32_t active_mtu;
  int32_t gid_table_length;
  uint32_t capabilities;
  uint32_t max_message;
  uint32_t violations[2];
  uint16_t pkey_table_length;
  uint16_t lid;
  uint16_t sm_lid;
  uint8_t lmc[5];
  uint8_t active_width;
  uint8_t active_speed;
  uint8_t phys_state;
  uint8_t link_layer;
  uint8_t flags;
};
static_assert(offsetof(PortAttributes, lid) == 34 && offsetof(PortAttributes, active_width) == 43);
static_assert(offsetof(PortAttributes, flags) == 47 && sizeof(PortAttributes) == 48);

/// Values of verbs.h by what they mean.
inline constexpr int32_t kNodeCa = 1, kTransportIb = 0, kPortActive = 4, kMtu4096 = 5, kAtomicHca = 1;
inline constexpr uint8_t kLinkInfiniband = 1, kLinkEthernet = 2;
inline constexpr int32_t kTypeRc = 2, kReadyToSend = 3;
inline constexpr int32_t kMaskState = 1, kMaskRoute = 1 << 7, kMaskPeer = 1 << 20;
enum Opcode : uint32_t { kRdmaWrite, kRdmaWriteImm, kSend, kRdmaRead = 4, kCompareSwap, kFetchAdd };
inline constexpr uint32_t kSignaled = 2, kInline = 8;
enum Status : uint32_t { kSuccess, kLocalProtection = 4, kRemoteAccess = 10 };
inline constexpr uint32_t kReceived = 128, kReceivedImm = 129, kWithImm = 2;

}  // namespace loopverbs::abi
