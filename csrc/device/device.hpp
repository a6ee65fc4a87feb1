// The vocabulary of the kernels: everything that crosses a warp, a block or a rank has its name here.
//
// Two bodies stand behind it. Under nvcc, device/cuda.cuh: PTX, for 8.0 and up. Under a plain C++ compiler,
// emulator/device.hpp: the same names over fibers and a memory model that delays and reorders. A kernel
// includes this file and nothing else of either, so its source is one.
//
//   who am I     thread() lane() warp() block() num_threads() num_warps() num_blocks()
//   together     sync_block() sync_warp() ballot(p) shuffle(v, lane)
//                warp_sum(v) warp_exclusive_sum(v) warp_or(v)
//   memory       load(p) store(p, v)                     plain; a race on it is an error
//                load_once(p)                            data nobody writes while the kernel runs
//                load_guess(p)                           the same of what may never have been written: used
//                                                        only if something else says that it was
//                load_streaming(p) store_streaming(p, v) plain, 16 bytes, and not worth a place in L1
//                prefetch(p)                             a hint: the line at p will be read
//                prefetch(p, bytes)                      the same of more; 16-byte addresses and sizes
//                load<Order, Scope>(p) store<Order, Scope>(p, v)
//                fetch_add<Order, Scope>(p, v) fetch_or<Order, Scope>(p, v)
//                fence<Order, Scope>()
//   waiting      wait_equal<Order, Scope>(p, value, deadline)    until *p is the value
//                wait_reached<Order, Scope>(p, epoch, deadline)  until *p is the epoch or a later one
//                wait_masked<Order, Scope>(p, mask, v, deadline, seen)   until (*p & mask) is v
//                wait_tag<Order, Scope>(p, tag, deadline, v)     until *p carries the tag
//   time         clock_ns()  Deadline  pause()  sm(): the number of the SM, for time lines
//   shared       SharedArray<T>: the block's dynamic shared memory, carved by byte offset; get set add bit_or,
//                and get<acquire> set<release>, ordered within the block; at(i): an address, for bulk copies
//   bulk copies  carried out later, in the async proxy; 16-byte addresses and sizes; one end is the block's
//                shared memory. Only where kHasBulkCopies: GPUs of compute capability 8 have none, and a kernel
//                moves its rows by plain accesses there, which the host must know (low_latency/share.hpp)
//                bulk_load(stage, from, bytes, barrier)  complete when a phase of the mbarrier is
//                bulk_store(to, stage, bytes) bulk_commit()  in groups of the thread, which complete in order
//                bulk_wait_read<N>()   until all groups of this thread but the last N have read their stages
//                bulk_wait<N>()        until they have written, too, and this thread sees it
//                fence_async<Space>()  the proxy fence: orders generic accesses before bulk copies, a read or
//                                      write of either; also between mbarrier_init and the first copy. The
//                                      other way round, a thread that has waited for a copy needs none
//   mbarriers    8 bytes of shared memory, one phase after the other, numbered from 0; a phase is complete when
//                `count` threads have arrived and all bytes expected of copies are there
//                mbarrier_init(b, count) mbarrier_invalidate(b)
//                mbarrier_arrive<Order, Scope>(b)
//                mbarrier_expect<Order, Scope>(b, bytes)  arrive, and have the phase wait for so many bytes
//                mbarrier_wait<Order, Scope>(b, phase, deadline)  until that phase is complete. Hardware looks
//                                      at its parity: it must be the running phase or the one before (-1
//                                      before phase 0)
//
//   other domains  puts: the only way there, and weaker than the rest. `to`, `from` and `word` are memory of
//                this rank that its NIC knows; what is written is the same place of `rank`. One thread each.
//                A put carries no more than its bytes, and is a relaxed operation: what else a signal is to
//                carry, and what it reads that other threads have stored, stands before a fence of system scope
//                put_signal<Update>(wire, to, from, bytes, word, value, rank)
//                                      the signal behind these bytes, of which there are some. Update:
//                                      signal_add; on the emulator signal_set as well, which need not stay
//                                      behind its bytes on every network
//                signal<Update>(wire, word, value, rank)   a signal by itself
//                close_wire(wire)      the operation puts nothing any more; by one thread, behind all its puts
//                put(to, from, bytes, rank) put_fence() put_quiet()
//                                      on the emulator alone, for litmus tests: a put without a signal; this
//                                      thread's puts to a rank so far are delivered before later ones; they,
//                                      and all it knows of its rank's, are delivered
//                wait_signal<Order, Scope>(word, epoch, deadline)  until the lower half of *word has reached it
//   FP8          e4m3.hpp, on either: bits_of_e4m3(byte)
//
// Orders: relaxed, acquire, release, acq_rel. Scopes: block_scope, gpu_scope, sys_scope. They are template
// arguments, spelled at the call, because they are what a reader has to check and a mutation has to break.
// Spaces of the proxy fence: shared_space, global_space, all_spaces. T is 1, 2, 4, 8 or 16 bytes wide for plain
// accesses; 4 or 8 for ordered ones.
#pragma once

#include <cstdint>

#include "device/e4m3.hpp"
#include "layout/arith.hpp"

namespace deepep::dev {

struct relaxed {};
struct acquire {};
struct release {};
struct acq_rel {};

struct block_scope {};
struct gpu_scope {};
struct sys_scope {};

struct shared_space {};
struct global_space {};
struct all_spaces {};

struct signal_set {};
struct signal_add {};

inline constexpr int kWarpSize = 32;
/// Bulk copies: what addresses and sizes are multiples of.
inline constexpr int kBulkUnit = 16;

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
