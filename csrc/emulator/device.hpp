// The vocabulary's body on the CPU: every operation is a question to the machine (machine.hpp), which checks it
// against the memory model and may let other threads run first. device/device.hpp says what each name means.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "device/e4m3.hpp"
#include "emulator/machine/machine.hpp"

#define DEEPEP_DEVICE inline
/// A kernel's body becomes a function over its arguments, and the kernel registers itself with its library.
#define DEEPEP_KERNEL(name, Args, threads)                                                              \
  inline void name(const Args& args);                                                                   \
  inline const ::deepep::emu::Registration name##_registration{                                         \
      {#name, threads, sizeof(Args), [](const void* args) { name(*static_cast<const Args*>(args)); }}}; \
  inline void name([[maybe_unused]] const Args& args)

#define DEEPEP_KERNEL_IN_FORMS(name, Args, threads, option, chosen) \
  inline void name##_body(const Args& args, bool option);           \
  DEEPEP_KERNEL(name, Args, threads) { name##_body(args, chosen); } \
  inline void name##_body(const Args& args, bool option)

namespace deepep::dev {

namespace detail {

using emu::machine;
using emu::Order;
using emu::Scope;
using emu::Site;

template <class T>
inline constexpr Order order_of = std::is_same_v<T, relaxed>   ? Order::relaxed
                                  : std::is_same_v<T, acquire> ? Order::acquire
                                  : std::is_same_v<T, release> ? Order::release
                                                               : Order::acq_rel;
template <class T>
inline constexpr Scope scope_of = std::is_same_v<T, block_scope> ? Scope::block
                                  : std::is_same_v<T, gpu_scope> ? Scope::gpu
                                                                 : Scope::sys;

template <class T>
inline constexpr bool is_plain_width =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
template <class T>
inline constexpr bool is_strong_width = std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>;

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T read(const T* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

/// Keeps a product or sum from being contracted with its neighbours, whatever the compiler's default.
inline float rounded(float value) {
#if defined(__aarch64__)
  asm("" : "+w"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#else
  volatile float kept = value;
  value = kept;
#endif
  return value;
}

}  // namespace detail

// ---- who am I ----------------------------------------------------------------------------------------------

DEEPEP_DEVICE int thread() { return emu::machine->me->thread; }
DEEPEP_DEVICE int lane() { return emu::machine->me->thread % kWarpSize; }
DEEPEP_DEVICE int warp() { return emu::machine->me->thread / kWarpSize; }
DEEPEP_DEVICE int block() { return emu::machine->me->block; }
DEEPEP_DEVICE int num_threads() { return emu::machine->me->num_threads; }
DEEPEP_DEVICE int num_warps() { return emu::machine->me->num_threads / kWarpSize; }
DEEPEP_DEVICE int num_blocks() { return emu::machine->me->num_blocks; }

// ---- together ----------------------------------------------------------------------------------------------

DEEPEP_DEVICE void sync_block(emu::Site site = emu::Site::current()) { emu::machine->sync_block(site); }
DEEPEP_DEVICE void sync_warp(emu::Site site = emu::Site::current()) { emu::machine->sync_warp(site); }
DEEPEP_DEVICE uint32_t ballot(bool p, emu::Site site = emu::Site::current()) {
  return emu::machine->ballot(p, site);
}
template <class T>
DEEPEP_DEVICE T shuffle(T v, int source_lane, emu::Site site = emu::Site::current()) {
  static_assert(sizeof(T) <= 8);
  return detail::from_bits<T>(emu::machine->shuffle(detail::to_bits(v), source_lane, site));
}
DEEPEP_DEVICE int warp_sum(int v, emu::Site site = emu::Site::current()) {
  return static_cast<int>(emu::machine->warp_sum(v, site));
}
DEEPEP_DEVICE int warp_exclusive_sum(int v, emu::Site site = emu::Site::current()) {
  return static_cast<int>(emu::machine->warp_exclusive_sum(v, site));
}
DEEPEP_DEVICE uint32_t warp_or(uint32_t v, emu::Site site = emu::Site::current()) {
  return emu::machine->warp_or(v, site);
}
DEEPEP_DEVICE int popcount(uint32_t bits) { return std::popcount(bits); }
DEEPEP_DEVICE int lowest_bit(uint32_t bits) { return bits == 0 ? -1 : std::countr_zero(bits); }

// ---- plain memory ------------------------------------------------------------------------------------------

template <class T>
DEEPEP_DEVICE T load(const T* p, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_plain_width<T>);
  emu::machine->plain_load(p, sizeof(T), site);
  return detail::read(p);
}
template <class T>
DEEPEP_DEVICE void store(T* p, T v, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_plain_width<T>);
  emu::machine->plain_store(p, sizeof(T), site);
  std::memcpy(p, &v, sizeof(T));
}
template <class T>
DEEPEP_DEVICE T load_once(const T* p, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_plain_width<T>);
  emu::machine->load_once(p, sizeof(T), site);
  return detail::read(p);
}
template <class T>
DEEPEP_DEVICE T load_guess(const T* p, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_plain_width<T>);
  emu::machine->load_guess(p, sizeof(T), site);
  return detail::read(p);
}
DEEPEP_DEVICE Vec16 load_streaming(const Vec16* p, emu::Site site = emu::Site::current()) {
  return load(p, site);
}
DEEPEP_DEVICE void store_streaming(Vec16* p, Vec16 v, emu::Site site = emu::Site::current()) {
  store(p, v, site);
}

/// A hint: it reads nothing, so nothing is checked.
DEEPEP_DEVICE void prefetch(const void*) {}
DEEPEP_DEVICE void prefetch(const void*, int64_t) {}

// ---- ordered memory ----------------------------------------------------------------------------------------

template <class Order, class Scope, class T>
DEEPEP_DEVICE T load(const T* p, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_strong_width<T>);
  static_assert(std::is_same_v<Order, relaxed> || std::is_same_v<Order, acquire>);
  return static_cast<T>(
      emu::machine->strong_load(p, sizeof(T), detail::order_of<Order>, detail::scope_of<Scope>, site));
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE void store(T* p, std::type_identity_t<T> v, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_strong_width<T>);
  static_assert(std::is_same_v<Order, relaxed> || std::is_same_v<Order, release>);
  emu::machine->strong_store(p, sizeof(T), v, detail::order_of<Order>, detail::scope_of<Scope>, site);
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE T fetch_add(T* p, std::type_identity_t<T> v, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_strong_width<T>);
  return static_cast<T>(emu::machine->strong_rmw(p, sizeof(T), emu::Rmw::add, v, detail::order_of<Order>,
                                                 detail::scope_of<Scope>, site));
}
template <class Order, class Scope, class T>
DEEPEP_DEVICE T fetch_or(T* p, std::type_identity_t<T> v, emu::Site site = emu::Site::current()) {
  static_assert(detail::is_strong_width<T>);
  return static_cast<T>(emu::machine->strong_rmw(p, sizeof(T), emu::Rmw::bit_or, v, detail::order_of<Order>,
                                                 detail::scope_of<Scope>, site));
}
template <class Order, class Scope>
DEEPEP_DEVICE void fence(emu::Site site = emu::Site::current()) {
  emu::machine->fence(detail::order_of<Order>, detail::scope_of<Scope>, site);
}

// ---- time and waiting --------------------------------------------------------------------------------------

DEEPEP_DEVICE uint64_t clock_ns() { return emu::machine->clock_ns(); }
DEEPEP_DEVICE void pause() { emu::machine->pause(); }
/// As if every block of a launch had its own.
DEEPEP_DEVICE uint32_t sm() { return static_cast<uint32_t>(block()); }

/// The moment after which a wait gives up.
struct Deadline {
  uint64_t end_ns;
  DEEPEP_DEVICE static Deadline in(uint64_t ns) { return {clock_ns() + ns}; }
  [[nodiscard]] DEEPEP_DEVICE bool passed() const { return clock_ns() > end_ns; }
};

namespace detail {

template <class Order, class Scope, class T>
bool wait(const T* p, emu::Condition condition, emu::Site site, Deadline deadline, uint64_t& seen) {
  return machine->wait(p, sizeof(T), condition, order_of<Order>, scope_of<Scope>, deadline.end_ns, seen, site);
}

}  // namespace detail

template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_equal(const uint32_t* p, uint32_t value, Deadline deadline,
                                            emu::Site site = emu::Site::current()) {
  uint64_t seen;
  return detail::wait<Order, Scope>(p, {emu::Condition::Kind::equal, value}, site, deadline, seen);
}
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_reached(const uint32_t* p, uint32_t epoch, Deadline deadline,
                                              emu::Site site = emu::Site::current()) {
  uint64_t seen;
  return detail::wait<Order, Scope>(p, {emu::Condition::Kind::reached, epoch}, site, deadline, seen);
}
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_masked(const uint32_t* p, uint32_t mask, uint32_t value,
                                             Deadline deadline, uint32_t& seen,
                                             emu::Site site = emu::Site::current()) {
  uint64_t word;
  const bool came =
      detail::wait<Order, Scope>(p, {emu::Condition::Kind::masked, value, mask}, site, deadline, word);
  seen = static_cast<uint32_t>(word);
  return came;
}
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_tag(const uint64_t* p, uint32_t tag, Deadline deadline, uint32_t& value,
                                          emu::Site site = emu::Site::current()) {
  uint64_t word;
  const bool came = detail::wait<Order, Scope>(p, {emu::Condition::Kind::tag, tag}, site, deadline, word);
  value = unpack_tagged(word).value;
  return came;
}

// ---- shared memory -----------------------------------------------------------------------------------------

/// A typed stretch of the block's dynamic shared memory, checked as global memory is.
template <class T>
class SharedArray {
 public:
  DEEPEP_DEVICE explicit SharedArray(int64_t byte_offset) : offset_(byte_offset) {}
  [[nodiscard]] DEEPEP_DEVICE T get(int i, emu::Site site = emu::Site::current()) const {
    return load(at(i), site);
  }
  DEEPEP_DEVICE void set(int i, T v, emu::Site site = emu::Site::current()) { store(at(i), v, site); }
  template <class Order>
  [[nodiscard]] DEEPEP_DEVICE T get(int i, emu::Site site = emu::Site::current()) const {
    return dev::load<Order, block_scope>(at(i), site);
  }
  template <class Order>
  DEEPEP_DEVICE void set(int i, T v, emu::Site site = emu::Site::current()) {
    dev::store<Order, block_scope>(at(i), v, site);
  }
  DEEPEP_DEVICE T add(int i, T v, emu::Site site = emu::Site::current()) {
    return rmw(i, emu::Rmw::add, v, site);
  }
  DEEPEP_DEVICE T bit_or(int i, T v, emu::Site site = emu::Site::current()) {
    return rmw(i, emu::Rmw::bit_or, v, site);
  }
  [[nodiscard]] DEEPEP_DEVICE T* at(int i) const {
    return reinterpret_cast<T*>(emu::machine->shared(offset_ + static_cast<int64_t>(sizeof(T)) * i));
  }

 private:
  T rmw(int i, emu::Rmw op, T v, emu::Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    return detail::from_bits<T>(emu::machine->strong_rmw(at(i), sizeof(T), op, detail::to_bits(v),
                                                         emu::Order::relaxed, emu::Scope::block, site));
  }
  int64_t offset_;
};

// ---- mbarriers and bulk copies -----------------------------------------------------------------------------

/// The machine has what 9.0 has; a host may keep a kernel from using it.
inline constexpr bool kHasBulkCopies = true;

DEEPEP_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count, emu::Site site = emu::Site::current()) {
  emu::machine->mbarrier_init(barrier, count, site);
}
DEEPEP_DEVICE void mbarrier_invalidate(uint64_t* barrier, emu::Site site = emu::Site::current()) {
  emu::machine->mbarrier_invalidate(barrier, site);
}
template <class Order, class Scope>
DEEPEP_DEVICE void mbarrier_arrive(uint64_t* barrier, emu::Site site = emu::Site::current()) {
  static_assert(std::is_same_v<Order, relaxed> || std::is_same_v<Order, release>);
  emu::machine->mbarrier_arrive(barrier, 0, detail::order_of<Order>, detail::scope_of<Scope>, site);
}
template <class Order, class Scope>
DEEPEP_DEVICE void mbarrier_expect(uint64_t* barrier, uint32_t bytes, emu::Site site = emu::Site::current()) {
  static_assert(std::is_same_v<Order, relaxed> || std::is_same_v<Order, release>);
  emu::machine->mbarrier_arrive(barrier, bytes, detail::order_of<Order>, detail::scope_of<Scope>, site);
}
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool mbarrier_wait(const uint64_t* barrier, uint32_t phase, Deadline deadline,
                                               emu::Site site = emu::Site::current()) {
  static_assert(std::is_same_v<Order, relaxed> || std::is_same_v<Order, acquire>);
  return emu::machine->mbarrier_wait(barrier, phase, detail::order_of<Order>, detail::scope_of<Scope>,
                                     deadline.end_ns, site);
}

DEEPEP_DEVICE void bulk_load(void* stage, const void* from, int64_t bytes, uint64_t* barrier,
                             emu::Site site = emu::Site::current()) {
  emu::machine->bulk_load(stage, from, bytes, barrier, site);
}
DEEPEP_DEVICE void bulk_store(void* to, const void* stage, int64_t bytes,
                              emu::Site site = emu::Site::current()) {
  emu::machine->bulk_store(to, stage, bytes, site);
}
DEEPEP_DEVICE void bulk_commit(emu::Site site = emu::Site::current()) { emu::machine->bulk_commit(site); }
template <int kPending>
DEEPEP_DEVICE void bulk_wait_read(emu::Site site = emu::Site::current()) {
  emu::machine->bulk_wait(kPending, true, site);
}
template <int kPending>
DEEPEP_DEVICE void bulk_wait(emu::Site site = emu::Site::current()) {
  emu::machine->bulk_wait(kPending, false, site);
}
template <class Space>
DEEPEP_DEVICE void fence_async(emu::Site site = emu::Site::current()) {
  emu::machine->fence_async(std::is_same_v<Space, shared_space>   ? emu::Spaces::shared
                            : std::is_same_v<Space, global_space> ? emu::Spaces::global
                                                                  : emu::Spaces::all,
                            site);
}

// ---- other domains -----------------------------------------------------------------------------------------

/// The machine carries puts by itself.
struct Wire {};
DEEPEP_DEVICE void close_wire(const Wire&) {}

DEEPEP_DEVICE void put(void* to, const void* from, int64_t bytes, int rank,
                       emu::Site site = emu::Site::current()) {
  emu::machine->put(to, from, bytes, nullptr, 0, false, rank, site);
}
template <class Update>
DEEPEP_DEVICE void put_signal(const Wire&, void* to, const void* from, int64_t bytes, uint64_t* signal,
                              uint64_t value, int rank, emu::Site site = emu::Site::current()) {
  emu::machine->put(to, from, bytes, signal, value, std::is_same_v<Update, signal_add>, rank, site);
}
template <class Update>
DEEPEP_DEVICE void signal(const Wire&, uint64_t* word, uint64_t value, int rank,
                          emu::Site site = emu::Site::current()) {
  emu::machine->signal(word, value, std::is_same_v<Update, signal_add>, rank, site);
}
DEEPEP_DEVICE void put_fence(emu::Site site = emu::Site::current()) { emu::machine->put_fence(site); }
DEEPEP_DEVICE void put_quiet(emu::Site site = emu::Site::current()) { emu::machine->put_quiet(site); }
template <class Order, class Scope>
[[nodiscard]] DEEPEP_DEVICE bool wait_signal(const uint64_t* signal, uint32_t epoch, Deadline deadline,
                                             emu::Site site = emu::Site::current()) {
  uint64_t seen;
  return detail::wait<Order, Scope>(signal, {emu::Condition::Kind::reached, epoch}, site, deadline, seen);
}

// ---- numbers -----------------------------------------------------------------------------------------------

DEEPEP_DEVICE float bf16_low(uint32_t word) { return std::bit_cast<float>(word << 16); }
DEEPEP_DEVICE float bf16_high(uint32_t word) { return std::bit_cast<float>(word & 0xffff0000u); }
/// Nearest even, as the hardware's conversion: every NaN becomes 0x7fff.
DEEPEP_DEVICE uint32_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fffu;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
DEEPEP_DEVICE uint32_t pack_bf16(float low, float high) { return to_bf16(low) | (to_bf16(high) << 16); }
/// As the hardware's arithmetic: every NaN becomes 0x7fffffff.
DEEPEP_DEVICE float settled(float value) {
  return std::isnan(value) ? std::bit_cast<float>(0x7fffffffu) : detail::rounded(value);
}
DEEPEP_DEVICE float add_rounded(float a, float b) { return settled(a + b); }
DEEPEP_DEVICE float mul_rounded(float a, float b) { return settled(a * b); }
DEEPEP_DEVICE float div_rounded(float a, float b) { return settled(a / b); }
DEEPEP_DEVICE uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
DEEPEP_DEVICE float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
DEEPEP_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  return e4m3_of_bits(bits_of(a)) | e4m3_of_bits(bits_of(b)) << 8 | e4m3_of_bits(bits_of(c)) << 16 |
         e4m3_of_bits(bits_of(d)) << 24;
}
DEEPEP_DEVICE uint32_t larger_bf16(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t of, uint32_t than) { return than <= 0x7f80u && than > of ? than : of; };
  return larger(a & 0xffffu, b & 0x7fffu) | larger(a >> 16, (b >> 16) & 0x7fffu) << 16;
}
/// By way of fp32, which has enough digits for that.
DEEPEP_DEVICE uint32_t add_bf16(uint32_t a, uint32_t b) {
  return pack_bf16(add_rounded(bf16_low(a), bf16_low(b)), add_rounded(bf16_high(a), bf16_high(b)));
}

}  // namespace deepep::dev
