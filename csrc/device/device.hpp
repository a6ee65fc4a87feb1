// The vocabulary of the kernels: everything that crosses a warp, a block or a rank has its name here.
//
// Two bodies stand behind it. Under nvcc, device/cuda.cuh: PTX for sm_90. Under a plain C++ compiler,
// emulator/device.hpp: the same names over fibers and a memory model that delays and reorders. A kernel
// includes this file and nothing else of either, so its source is one.
//
//   who am I     thread() lane() warp() block() num_threads() num_warps() num_blocks()
//   together     sync_block() sync_warp() ballot(p) shuffle(v, lane) warp_sum(v) warp_exclusive_sum(v)
//   memory       load(p) store(p, v)                     plain; a race on it is an error
//                load_once(p)                            data nobody writes while the kernel runs
//                load_streaming(p) store_streaming(p, v) plain, 16 bytes, and not worth a place in L1
//                prefetch(p)                             a hint: the line at p will be read
//                load<Order, Scope>(p) store<Order, Scope>(p, v)
//                fetch_add<Order, Scope>(p, v) fetch_or<Order, Scope>(p, v)
//                fence<Order, Scope>()
//   waiting      wait_equal<Order, Scope>(p, value, deadline)    until *p is the value
//                wait_reached<Order, Scope>(p, epoch, deadline)  until *p is the epoch or a later one
//                wait_masked<Order, Scope>(p, mask, v, deadline, seen)   until (*p & mask) is v
//                wait_tag<Order, Scope>(p, tag, deadline, v)     until *p carries the tag
//   time         clock_ns()  Deadline  pause()
//   shared       SharedArray<T>: the block's dynamic shared memory, carved by byte offset; get set add bit_or,
//                and get<acquire> set<release>, ordered within the block
//
// Orders: relaxed, acquire, release, acq_rel. Scopes: block_scope, gpu_scope, sys_scope. They are template
// arguments, spelled at the call, because they are what a reader has to check and a mutation has to break.
// T is 1, 2, 4, 8 or 16 bytes wide for plain accesses; 4 or 8 for ordered ones.
#pragma once

#include <cstdint>

#include "core/arith.hpp"

namespace deepep::dev {

struct relaxed {};
struct acquire {};
struct release {};
struct acq_rel {};

struct block_scope {};
struct gpu_scope {};
struct sys_scope {};

inline constexpr int kWarpSize = 32;

/// Sixteen bytes as one access moves them.
struct alignas(16) Vec16 {
  uint32_t w[4];
};

/// A 32-bit value with the epoch it belongs to: one 8-byte store carries both, so the value is its own flag.
struct Tagged {
  uint32_t value;
  uint32_t tag;
};
[[nodiscard]] DEEPEP_HD constexpr uint64_t pack_tagged(uint32_t value, uint32_t tag) {
  return (static_cast<uint64_t>(tag) << 32) | value;
}
[[nodiscard]] DEEPEP_HD constexpr Tagged unpack_tagged(uint64_t word) {
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

}  // namespace deepep::dev

#if defined(__CUDACC__)
#include "device/cuda.cuh"
#else
#include "emulator/device.hpp"
#endif
