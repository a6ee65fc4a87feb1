// The vocabulary's body for GPUs, of compute capability 8.0 and up: what an older one lacks is done by other
// instructions there, to the same bits. The only file of the project with PTX in it.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device/put_queue.hpp"

#define DEEPEP_DEVICE __device__ __forceinline__
/// A kernel: `DEEPEP_KERNEL(name, Args, threads) { ... args ... }`. One block per SM: blocks wait for each
/// other's ranks, so all of them must be resident.
#define DEEPEP_KERNEL(name, Args, threads) \
  __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)

/// A kernel in two forms, `name` and `name_option`: its body reads the bool `option`, which the compiler knows.
/// The emulator has one, in which it is `chosen`, of `args`.
#define DEEPEP_KERNEL_IN_FORMS(name, Args, threads, option, chosen)          \
  DEEPEP_DEVICE void name##_body(const Args& args, bool option);             \
  DEEPEP_KERNEL(name, Args, threads) { name##_body(args, false); }           \
  DEEPEP_KERNEL(name##_##option, Args, threads) { name##_body(args, true); } \
  DEEPEP_DEVICE void name##_body(const Args& args, bool option)

namespace deepep::dev {

#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;  // ten times the compute capability that this is compiled for: 900
#else
inline constexpr int kArch = 0;  // the host's
#endif
/// Where it is false, what bulk copies and their mbarriers do is nothing, and no kernel may come to it.
inline constexpr bool kHasBulkCopies = kArch >= 900;

DEEPEP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DEEPEP_DEVICE int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }
DEEPEP_DEVICE int warp() { return static_cast<int>(threadIdx.x / kWarpSize); }
DEEPEP_DEVICE int block() { return static_cast<int>(blockIdx.x); }
DEEPEP_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
DEEPEP_DEVICE int num_warps() { return static_cast<int>(blockDim.x / kWarpSize); }
DEEPEP_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

DEEPEP_DEVICE void sync_block() { __syncthreads(); }
DEEPEP_DEVICE void sync_warp() { __syncwarp(); }
DEEPEP_DEVICE uint32_t ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
template <class T>
DEEPEP_DEVICE T shuffle(T v, int source_lane) {
  return __shfl_sync(0xffffffffu, v, source_lane);
}
DEEPEP_DEVICE int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }
DEEPEP_DEVICE uint32_t warp_or(uint32_t v) { return __reduce_or_sync(0xffffffffu, v); }
/// The sum of the lanes before this one.
DEEPEP_DEVICE int warp_exclusive_sum(int v) {
  int sum = v;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane() >= step) sum += below;
  }
  return sum - v;
}
DEEPEP_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
DEEPEP_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// ---- plain memory ------------------------------------------------------------------------------------------

inline constexpr int kLineBytes = 128;  // of L2

template <class T>
DEEPEP_DEVICE T load(const T* p) {
  return *p;
}

template <class T>
DEEPEP_DEVICE void store(T* p, T v) {
  *p = v;
}

template <class T>
DEEPEP_DEVICE T load_once(const T* p) {
  if constexpr (sizeof(T) == 16) {
    T v;
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(p));
    return v;
  } else {
    return __ldg(p);
  }
}
template <class T>
DEEPEP_DEVICE T load_guess(const T* p) {
  return load_once(p);
}

DEEPEP_DEVICE Vec16 load_streaming(const Vec16* p) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}

DEEPEP_DEVICE void store_streaming(Vec16* p, Vec16 v) {
  asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

DEEPEP_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEEPEP_DEVICE void prefetch(const void* p, int64_t bytes) {
  if constexpr (kHasBulkCopies) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(static_cast<uint32_t>(bytes)));
  } else {
#pragma unroll 1
    for (int64_t line = 0; line < bytes; line += kLineBytes) prefetch(static_cast<const std::byte*>(p) + line);
  }
}

// ---- ordered memory ----------------------------------------------------------------------------------------

// One asm statement for each (operation, order, scope, width): `.order.scope.type` are part of the opcode.
#define DEEPEP_LOAD(ORDER, SCOPE, PTX, T, TYPE, REG)                                       \
  DEEPEP_DEVICE T load_impl(ORDER, SCOPE, const T* p) {                                    \
    T v;                                                                                   \
    asm volatile("ld." PTX ".global." TYPE " %0, [%1];" : "=" REG(v) : "l"(p) : "memory"); \
    return v;                                                                              \
  }
#define DEEPEP_STORE(ORDER, SCOPE, PTX, T, TYPE, REG)                                 \
  DEEPEP_DEVICE void store_impl(ORDER, SCOPE, T* p, T v) {                            \
    asm volatile("st." PTX ".global." TYPE " [%0], %1;" ::"l"(p), REG(v) : "memory"); \
  }
#define DEEPEP_FETCH(NAME, OP, ORDER, SCOPE, PTX, T, TYPE, REG)      \
  DEEPEP_DEVICE T NAME##_impl(ORDER, SCOPE, T* p, T v) {             \
    T old;                                                           \
    asm volatile("atom." PTX ".global." OP "." TYPE " %0, [%1], %2;" \
                 : "=" REG(old)                                      \
                 : "l"(p), REG(v)                                    \
                 : "memory");                                        \
    return old;                                                      \
  }
#define DEEPEP_WIDTHS(MACRO, ...)          \
  MACRO(__VA_ARGS__, uint32_t, "b32", "r") \
  MACRO(__VA_ARGS__, uint64_t, "b64", "l")

DEEPEP_WIDTHS(DEEPEP_LOAD, relaxed, gpu_scope, "relaxed.gpu")
DEEPEP_WIDTHS(DEEPEP_LOAD, relaxed, sys_scope, "relaxed.sys")
DEEPEP_WIDTHS(DEEPEP_LOAD, acquire, gpu_scope, "acquire.gpu")
DEEPEP_WIDTHS(DEEPEP_LOAD, acquire, sys_scope, "acquire.sys")
DEEPEP_WIDTHS(DEEPEP_STORE, relaxed, gpu_scope, "relaxed.gpu")
DEEPEP_WIDTHS(DEEPEP_STORE, relaxed, sys_scope, "relaxed.sys")
DEEPEP_WIDTHS(DEEPEP_STORE, release, gpu_scope, "release.gpu")
DEEPEP_WIDTHS(DEEPEP_STORE, release, sys_scope, "release.sys")

#define DEEPEP_ADD_WIDTHS(ORDER, SCOPE, PTX)                              \
  DEEPEP_FETCH(fetch_add, "add", ORDER, SCOPE, PTX, uint32_t, "u32", "r") \
  DEEPEP_FETCH(fetch_add, "add", ORDER, SCOPE, PTX, uint64_t, "u64", "l") \
  DEEPEP_FETCH(fetch_or, "or", ORDER, SCOPE, PTX, uint32_t, "b32", "r")   \
  DEEPEP_FETCH(fetch_or, "or", ORDER, SCOPE, PTX, uint64_t, "b64", "l")
DEEPEP_ADD_WIDTHS(relaxed, gpu_scope, "relaxed.gpu")
DEEPEP_ADD_WIDTHS(release, gpu_scope, "release.gpu")
DEEPEP_ADD_WIDTHS(acquire, gpu_scope, "acquire.gpu")
DEEPEP_ADD_WIDTHS(acq_rel, gpu_scope, "acq_rel.gpu")
DEEPEP_ADD_WIDTHS(relaxed, sys_scope, "relaxed.sys")

#undef DEEPEP_ADD_WIDTHS
#undef DEEPEP_WIDTHS
#undef DEEPEP_FETCH
#undef DEEPEP_STORE
#undef DEEPEP_LOAD

template <class Order, class Scope, class T>
DEEPEP_DEVICE T load(const T* p) {
  return load_impl(Order{}, Scope{}, p);
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE void store(T* p, std::type_identity_t<T> v) {
  store_impl(Order{}, Scope{}, p, v);
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE T fetch_add(T* p, std::type_identity_t<T> v) {
  return fetch_add_impl(Order{}, Scope{}, p, v);
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE T fetch_or(T* p, std::type_identity_t<T> v) {
  return fetch_or_impl(Order{}, Scope{}, p, v);
}

DEEPEP_DEVICE void fence_impl(acq_rel, gpu_scope) { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEEPEP_DEVICE void fence_impl(acq_rel, sys_scope) { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
template <class Order, class Scope>
DEEPEP_DEVICE void fence() {
  fence_impl(Order{}, Scope{});
}

// ---- time and waiting --------------------------------------------------------------------------------------

DEEPEP_DEVICE uint64_t clock_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

DEEPEP_DEVICE uint32_t sm() {
  uint32_t number;
  asm("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

/// The moment after which a wait gives up.
struct Deadline {
  uint64_t end_ns;
  DEEPEP_DEVICE static Deadline in(uint64_t ns) { return {clock_ns() + ns}; }
  [[nodiscard]] DEEPEP_DEVICE bool passed() const { return clock_ns() > end_ns; }
};

/// A short rest between two looks at something that another warp of the block will change.
DEEPEP_DEVICE void pause() { __nanosleep(32); }

/// How many reads of a flag go by between two looks at the clock.
inline constexpr int kPollsPerClock = 64;

/// Reads *p until `satisfied` says so of what was read; false if the deadline passed first.
template <class Order, class Scope, class T, class Satisfied>
[[nodiscard]] DEEPEP_DEVICE bool wait_until(const T* p, const Satisfied& satisfied, Deadline deadline) {
  for (;;) {
#pragma unroll 1  // each look from the instructions of the last, which are in the cache
    for (int i = 0; i < kPollsPerClock; ++i)
      if (satisfied(load<Order, Scope>(p))) return true;
    if (deadline.passed()) return false;
  }
}

template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_equal(const uint32_t* p, uint32_t value, Deadline deadline) {
  return wait_until<Order, Scope>(p, [=](uint32_t seen) { return seen == value; }, deadline);
}

template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_reached(const uint32_t* p, uint32_t epoch, Deadline deadline) {
  // Epochs wrap around: the sign of the difference tells which is later.
  return wait_until<Order, Scope>(
      p, [=](uint32_t seen) { return static_cast<int32_t>(seen - epoch) >= 0; }, deadline);
}

/// What was read last goes to `seen`, also if the deadline passed.
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_masked(const uint32_t* p, uint32_t mask, uint32_t value,
                                             Deadline deadline, uint32_t& seen) {
  const auto matches = [&](uint32_t word) {
    seen = word;
    return (word & mask) == value;
  };
  return wait_until<Order, Scope>(p, matches, deadline);
}

/// The tagged word's value goes to `value`, also if the deadline passed.
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_tag(const uint64_t* p, uint32_t tag, Deadline deadline, uint32_t& value) {
  const auto has_tag = [&](uint64_t word) {
    value = unpack_tagged(word).value;
    return unpack_tagged(word).tag == tag;
  };
  return wait_until<Order, Scope>(p, has_tag, deadline);
}

// ---- shared memory -----------------------------------------------------------------------------------------

/// A typed stretch of the block's dynamic shared memory.
template <class T>
class SharedArray {
 public:
  DEEPEP_DEVICE explicit SharedArray(int64_t byte_offset) {
    extern __shared__ __align__(16) std::byte dynamic_shared[];
    data_ = reinterpret_cast<T*>(dynamic_shared + byte_offset);
  }
  [[nodiscard]] DEEPEP_DEVICE T get(int i) const { return data_[i]; }
  DEEPEP_DEVICE void set(int i, T v) { data_[i] = v; }
  /// Ordered within the block: what the writer did before `set<release>` comes before what the reader does
  /// after a `get<acquire>` that saw it. Atomics both, or the sanitizer would take them for a race.
  template <class Order>
  [[nodiscard]] DEEPEP_DEVICE T get(int i) const {
    static_assert(sizeof(T) == 4 && std::is_same_v<Order, acquire>);
    T v;
    asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;" : "=r"(v) : "r"(address(i)) : "memory");
    return v;
  }
  template <class Order>
  DEEPEP_DEVICE void set(int i, T v) {
    static_assert(sizeof(T) == 4 && std::is_same_v<Order, release>);
    T old;
    asm volatile("atom.release.cta.shared.exch.b32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(address(i)), "r"(v)
                 : "memory");
  }
  /// Atomic within the block; returns what was there before.
  DEEPEP_DEVICE T add(int i, T v) { return atomicAdd_block(data_ + i, v); }
  DEEPEP_DEVICE T bit_or(int i, T v) { return atomicOr_block(data_ + i, v); }
  /// The address of an element: a stage of bulk copies, an mbarrier.
  [[nodiscard]] DEEPEP_DEVICE T* at(int i) const { return data_ + i; }

 private:
  [[nodiscard]] DEEPEP_DEVICE uint32_t address(int i) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data_ + i));
  }

  T* data_;
};

// ---- mbarriers ---------------------------------------------------------------------------------------------

DEEPEP_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

DEEPEP_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEEPEP_DEVICE void mbarrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEEPEP_DEVICE void mbarrier_arrive_impl(release, block_scope, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
template <class Order, class Scope>
DEEPEP_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_arrive_impl(Order{}, Scope{}, barrier);
}

DEEPEP_DEVICE void mbarrier_expect_impl(release, block_scope, uint64_t* barrier, uint32_t bytes) {
  if constexpr (kHasBulkCopies)
    asm volatile(
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
template <class Order, class Scope>
DEEPEP_DEVICE void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  mbarrier_expect_impl(Order{}, Scope{}, barrier, bytes);
}

#define DEEPEP_MBARRIER_LOOK(INSTRUCTION)                                                  \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred complete;\n"                                                             \
      "mbarrier." INSTRUCTION ".parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n"  \
      "selp.b32 %0, 1, 0, complete;\n"                                                     \
      "}"                                                                                  \
      : "=r"(complete)                                                                     \
      : "r"(shared_address(barrier)), "r"(phase & 1u)                                      \
      : "memory")
/// One look, in which hardware of 9.0 and up may suspend the thread for a while.
[[nodiscard]] DEEPEP_DEVICE bool mbarrier_try_impl(acquire, block_scope, const uint64_t* barrier,
                                                   uint32_t phase) {
  uint32_t complete;
  if constexpr (kArch >= 900)
    DEEPEP_MBARRIER_LOOK("try_wait");
  else
    DEEPEP_MBARRIER_LOOK("test_wait");
  return complete != 0;
}
#undef DEEPEP_MBARRIER_LOOK
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool mbarrier_wait(const uint64_t* barrier, uint32_t phase, Deadline deadline) {
  for (;;) {
#pragma unroll 1  // each look from the instructions of the last, which are in the cache
    for (int i = 0; i < kPollsPerClock; ++i)
      if (mbarrier_try_impl(Order{}, Scope{}, barrier, phase)) return true;
    if (deadline.passed()) return false;
  }
}

// ---- bulk copies -------------------------------------------------------------------------------------------

DEEPEP_DEVICE void bulk_load(void* stage, const void* from, int64_t bytes, uint64_t* barrier) {
  // .shared::cluster with an address of this block: the form that every PTX version with bulk copies has.
  if constexpr (kHasBulkCopies)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(stage)),
        "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(bytes)), "r"(shared_address(barrier))
        : "memory");
}
DEEPEP_DEVICE void bulk_store(void* to, const void* stage, int64_t bytes) {
  if constexpr (kHasBulkCopies)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(to)),
                 "r"(shared_address(stage)), "r"(static_cast<uint32_t>(bytes))
                 : "memory");
}
DEEPEP_DEVICE void bulk_commit() {
  if constexpr (kHasBulkCopies) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
DEEPEP_DEVICE void bulk_wait_read() {
  if constexpr (kHasBulkCopies) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
DEEPEP_DEVICE void bulk_wait() {
  if constexpr (kHasBulkCopies) asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

DEEPEP_DEVICE void fence_async_impl(shared_space) {
  if constexpr (kHasBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEEPEP_DEVICE void fence_async_impl(global_space) {
  if constexpr (kHasBulkCopies) asm volatile("fence.proxy.async.global;" ::: "memory");
}
DEEPEP_DEVICE void fence_async_impl(all_spaces) {
  if constexpr (kHasBulkCopies) asm volatile("fence.proxy.async;" ::: "memory");
}
template <class Space>
DEEPEP_DEVICE void fence_async() {
  fence_async_impl(Space{});
}

// ---- other domains -----------------------------------------------------------------------------------------

/// Signals count in 64 bits; an epoch is the lower half.
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_signal(const uint64_t* word, uint32_t epoch, Deadline deadline) {
  const auto reached = [=](uint64_t seen) {
    return static_cast<int32_t>(static_cast<uint32_t>(seen) - epoch) >= 0;
  };
  return wait_until<Order, Scope>(word, reached, deadline);
}

using Wire = PutQueue;

/// The last store carries what the thread knows: whoever serves the order reads it behind an acquire.
DEEPEP_DEVICE void order_put(const Wire& wire, const PutOrder& order) {
  const uint32_t number = fetch_add<relaxed, gpu_scope>(&wire.state->ordered, 1u);
  PutOrder* at = wire.orders + (number & wire.last);
  at->to = order.to;
  at->from = order.from;
  at->bytes = order.bytes;
  at->word = order.word;
  at->value = order.value;
  at->rank = order.rank;
  store<release, gpu_scope>(&at->ready, number + 1);
}
template <class Update>
DEEPEP_DEVICE void put_signal(const Wire& wire, void* to, const void* from, int64_t bytes, uint64_t* word,
                              uint64_t value, int rank) {
  static_assert(std::is_same_v<Update, signal_add>);
  order_put(wire, {.to = to, .from = from, .bytes = bytes, .word = word, .value = value, .rank = rank});
}
template <class Update>
DEEPEP_DEVICE void signal(const Wire& wire, uint64_t* word, uint64_t value, int rank) {
  put_signal<Update>(wire, nullptr, nullptr, 0, word, value, rank);
}
DEEPEP_DEVICE void close_wire(const Wire& wire) {
  store<release, gpu_scope>(&wire.state->closed, load(&wire.state->closed) + 1);
}

// ---- numbers -----------------------------------------------------------------------------------------------

/// The two bf16 of one 32-bit word, low half first.
DEEPEP_DEVICE float bf16_low(uint32_t word) { return __uint_as_float(word << 16); }
DEEPEP_DEVICE float bf16_high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
/// Rounds to nearest even; NaN stays NaN.
DEEPEP_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
/// Both sums, each rounded once to nearest even; subnormals are kept.
DEEPEP_DEVICE uint32_t add_bf16(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (kArch >= 900)
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  else  // times 1.0, twice
    asm("fma.rn.bf16x2 %0, %1, %3, %2;" : "=r"(sum) : "r"(a), "r"(b), "r"(0x3f803f80u));
  return sum;
}
/// Of each half the larger magnitude: `a` is one already. A NaN has none.
DEEPEP_DEVICE uint32_t larger_bf16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b & 0x7fff7fffu));
  return larger;
}
/// The sum, never contracted with a neighbouring product.
DEEPEP_DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
DEEPEP_DEVICE float mul_rounded(float a, float b) { return __fmul_rn(a, b); }
DEEPEP_DEVICE float div_rounded(float a, float b) { return __fdiv_rn(a, b); }
DEEPEP_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DEEPEP_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
/// Four channels as e4m3, the first in the lowest byte: device/e4m3.hpp, in hardware of 8.9 and up.
DEEPEP_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  if constexpr (kArch < 890)
    return e4m3_of_bits(bits_of(a)) | e4m3_of_bits(bits_of(b)) << 8 | e4m3_of_bits(bits_of(c)) << 16 |
           e4m3_of_bits(bits_of(d)) << 24;
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<uint32_t>(high) << 16 | low;
}

}  // namespace deepep::dev
