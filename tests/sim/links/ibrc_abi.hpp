// What a host of NVSHMEM's transport plug-ins and they themselves see of each other, as far as ibrc_probe.cpp
// goes: sizes, offsets and numbers of nvidia-nvshmem-cu13 3.4.5 on x86-64, and of no other version. They were
// read off the plug-in's own code (what it allocates, where it stores its functions); `problem_of` looks
// again at whatever a plug-in that was loaded shows of them.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace ibrc_abi {

/// Of the interface between host and plug-in: major * 10000 + minor * 100 + patch.
inline constexpr int kInterface = 30000;
/// The plug-in's one symbol.
inline constexpr const char* kInitName = "nvshmemt_init";

enum class Rma : int32_t { kPut = 1, kGet = 4 };
enum class Amo : int32_t { kAdd = 4, kSignalSet = 9, kSignalAdd = 10 };

/// `can_reach_peer` sets these: a peer is written, read and added to by the CPU's requests.
inline constexpr int kReachedByCpu = 1 << 4 | 1 << 5 | 1 << 6;
inline constexpr uint64_t kLongestOperation = uint64_t{1} << 30;

/// Filled by the plug-in when memory is registered, sent to peers as it is.
struct MemoryHandle {
  char bytes[512];
};

struct Place {
  void* address;
  uint64_t offset;
  MemoryHandle* handle;
};

struct RmaVerb {
  Rma kind;
  int32_t is_nonblocking;
  int32_t is_on_stream;
  void* stream;
};
static_assert(sizeof(RmaVerb) == 24);

struct RmaExtent {
  uint64_t elements;
  int32_t element_bytes;
  int64_t source_stride;
  int64_t target_stride;
};
static_assert(sizeof(RmaExtent) == 32);

struct AmoVerb {
  Amo kind;
  int32_t has_result;
  int32_t has_value;
  int32_t has_comparison;
};
static_assert(sizeof(AmoVerb) == 16);

struct AmoTarget {
  Place remote;
  uint64_t result_flag;
  void* pointers[3];
  uint64_t value;
  uint64_t comparison;
  MemoryHandle* result_handle;
};
static_assert(offsetof(AmoTarget, value) == 56 && sizeof(AmoTarget) == 80);

struct AmoExtent {
  int32_t type;
  int32_t element_bytes;
};

/// Exchanges between the hosts' processes. The plug-in calls `alltoall` alone, when it connects.
struct Bootstrap {
  int32_t version;
  int32_t rank;
  int32_t ranks;
  int32_t node_rank;
  int32_t node_ranks;
  int (*allgather)(const void*, void*, int, Bootstrap*);
  int (*alltoall)(const void*, void*, int, Bootstrap*);
  void* others[6];
};
static_assert(offsetof(Bootstrap, alltoall) == 32);

struct Transport {
  int32_t version;
  int32_t type;
  int32_t* capabilities;
  int (*can_reach_peer)(int*, void*, Transport*);
  int (*connect)(Transport*, int*, int);
  int (*register_memory)(MemoryHandle*, void*, size_t, Transport*, bool);
  int (*release_memory)(MemoryHandle*, Transport*);
  int (*finalize)(Transport*);
  int (*show_info)(Transport*, int);
  int (*progress)(Transport*);
  int (*rma)(Transport*, int, RmaVerb, Place*, Place*, RmaExtent, int);
  int (*amo)(Transport*, int, void*, AmoVerb, AmoTarget*, AmoExtent, int);
  int (*fence)(Transport*, int, int);  // null: its queue pairs keep order
  int (*quiet)(Transport*, int, int);
  int (*enforce_consistency)(Transport*);
  int (*enforce_consistency_at_target)(Transport*);
  void* add_device_handles;
  Bootstrap* bootstrap;
  void* state;
  void* of_type;
  void* cache;
  char** device_paths;
  int32_t attributes;
  int32_t devices;
  bool atomics_complete_on_quiet;
  bool is_initialized;
  bool has_no_proxy;
  void* heap;
  uint64_t log2_granularity;
  uint64_t longest_operation;
  uint32_t atomic_bytes;
  int32_t index;
  int32_t rank;
  int32_t ranks;
  void* aliases;
  void* egm_regions;  // a std::unordered_map<void*, size_t>
};
static_assert(offsetof(Transport, can_reach_peer) == 0x10 && offsetof(Transport, rma) == 0x48);
static_assert(offsetof(Transport, enforce_consistency_at_target) == 0x70);
static_assert(offsetof(Transport, bootstrap) == 0x80 && offsetof(Transport, device_paths) == 0xa0);
static_assert(offsetof(Transport, is_initialized) == 0xb1 && offsetof(Transport, longest_operation) == 0xc8);
static_assert(offsetof(Transport, rank) == 0xd8 && sizeof(Transport) == 0xf0);

/// The driver's functions that the host passes on; the plug-in calls the first and the fourth.
struct CudaFunctions {
  int (*get_device)(int*);
  void* before[2];
  int (*get_attribute)(int*, int, int);
  void* others[60];
};

using Init = int (*)(Transport**, CudaFunctions*, int);

/// What a transport that has been initialised shows not to be as it is declared here; empty: nothing.
inline std::string problem_of(const Transport& made, const void* init) {
  Dl_info plugin{};
  if (dladdr(init, &plugin) == 0) return "the plug-in has no name";
  const auto within = [&](const void* address) {
    Dl_info found{};
    return dladdr(address, &found) != 0 && strcmp(found.dli_fname, plugin.dli_fname) == 0;
  };
  if (made.version != kInterface) return "interface " + std::to_string(made.version);
  if (!made.is_initialized) return "it does not say that it was initialised";
  if (made.devices != 1) return std::to_string(made.devices) + " devices; the wire has one";
  if (made.longest_operation != kLongestOperation) return "another longest operation";
  const void* functions[] = {reinterpret_cast<const void*>(made.can_reach_peer),
                             reinterpret_cast<const void*>(made.connect),
                             reinterpret_cast<const void*>(made.register_memory),
                             reinterpret_cast<const void*>(made.release_memory),
                             reinterpret_cast<const void*>(made.finalize),
                             reinterpret_cast<const void*>(made.progress),
                             reinterpret_cast<const void*>(made.rma),
                             reinterpret_cast<const void*>(made.amo),
                             reinterpret_cast<const void*>(made.quiet),
                             reinterpret_cast<const void*>(made.enforce_consistency_at_target)};
  for (const void* function : functions) {
    if (!within(function)) return "a function is not the plug-in's";
  }
  if (made.fence != nullptr && !within(reinterpret_cast<const void*>(made.fence))) return "the fence is not";
  return "";
}

}  // namespace ibrc_abi
