#include "emulator/run/fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

// DEEPEP_EMULATOR_UCONTEXT asks for the portable way on machines that need not go it.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(DEEPEP_EMULATOR_UCONTEXT)
#define DEEPEP_EMULATOR_UCONTEXT
#endif
#if defined(DEEPEP_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace deepep::emu {

#if defined(__x86_64__) && !defined(DEEPEP_EMULATOR_UCONTEXT)

// Callee-saved registers go to the stack, the stack pointer to the context. A fresh fiber's stack holds the
// same seven words, of which r12 is the entry, r13 its argument, and the return address the trampoline.
asm(R"(
  .text
  .p2align 4
  .type deepep_emu_switch, @function
deepep_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size deepep_emu_switch, .-deepep_emu_switch

  .p2align 4
  .type deepep_emu_start, @function
deepep_emu_start:
  movq %r13, %rdi
  callq *%r12
  ud2
  .size deepep_emu_start, .-deepep_emu_start
)");
extern "C" {
__attribute__((visibility("hidden"))) void deepep_emu_switch(Context*, Context*) asm("deepep_emu_switch");
__attribute__((visibility("hidden"))) void deepep_emu_start() asm("deepep_emu_start");
}

Context make_context(std::byte* stack, void (*entry)(void*), void* argument) {
  auto* top = reinterpret_cast<uint64_t*>(stack + StackPool::kStackBytes);
  *--top = 0;  // so that the trampoline starts with the stack on 16 bytes
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(&deepep_emu_start);
  *--top = 0;                                     // rbp
  *--top = 0;                                     // rbx
  *--top = reinterpret_cast<uint64_t>(entry);     // r12
  *--top = reinterpret_cast<uint64_t>(argument);  // r13
  *--top = 0;                                     // r14
  *--top = 0;                                     // r15
  return {top};
}

void switch_context(Context& from, Context& to) { deepep_emu_switch(&from, &to); }

#elif defined(__aarch64__) && !defined(DEEPEP_EMULATOR_UCONTEXT)

// x19-x30 and d8-d15 are the callee's to save. A fresh fiber finds its entry in x19 and its argument in x20.
asm(R"(
  .text
  .p2align 4
  .type deepep_emu_switch, %function
deepep_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size deepep_emu_switch, .-deepep_emu_switch

  .p2align 4
  .type deepep_emu_start, %function
deepep_emu_start:
  mov x0, x20
  blr x19
  brk #0
  .size deepep_emu_start, .-deepep_emu_start
)");
extern "C" {
__attribute__((visibility("hidden"))) void deepep_emu_switch(Context*, Context*) asm("deepep_emu_switch");
__attribute__((visibility("hidden"))) void deepep_emu_start() asm("deepep_emu_start");
}

Context make_context(std::byte* stack, void (*entry)(void*), void* argument) {
  auto* frame = reinterpret_cast<uint64_t*>(stack + StackPool::kStackBytes - 160);
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[0] = reinterpret_cast<uint64_t>(entry);
  frame[1] = reinterpret_cast<uint64_t>(argument);
  frame[11] = reinterpret_cast<uint64_t>(&deepep_emu_start);  // x30
  return {frame};
}

void switch_context(Context& from, Context& to) { deepep_emu_switch(&from, &to); }

#else

// Any other machine: ucontext, an order of magnitude slower. The saved context lives at the end of the stack it
// describes; the scheduler's own lives in a thread-local.
namespace {
struct Start {
  void (*entry)(void*);
  void* argument;
};
thread_local Start start;
void trampoline() { start.entry(start.argument); }
struct Saved {
  ucontext_t context;
  Start start;
  bool started;
};
thread_local Saved scheduler;
}  // namespace

Context make_context(std::byte* stack, void (*entry)(void*), void* argument) {
  auto* saved = new (stack + StackPool::kStackBytes - sizeof(Saved)) Saved{{}, {entry, argument}, false};
  getcontext(&saved->context);
  saved->context.uc_stack.ss_sp = stack;
  saved->context.uc_stack.ss_size = StackPool::kStackBytes - sizeof(Saved);
  makecontext(&saved->context, trampoline, 0);
  return {saved};
}

void switch_context(Context& from, Context& to) {
  if (from.stack_pointer == nullptr) from.stack_pointer = &scheduler;
  auto* next = static_cast<Saved*>(to.stack_pointer);
  if (!next->started) start = next->start;
  next->started = true;
  swapcontext(&static_cast<Saved*>(from.stack_pointer)->context, &next->context);
}

#endif

namespace {

constexpr size_t kStacksPerSlab = 128;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t stride() { return StackPool::kStackBytes + page_bytes(); }

std::byte* map_slab() {
  void* base = mmap(nullptr, stride() * kStacksPerSlab, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  auto* slab = static_cast<std::byte*>(base);
  for (size_t i = 0; i < kStacksPerSlab; ++i) {
    // A kernel that overruns its stack stops here instead of in its neighbour's.
    if (mprotect(slab + i * stride(), page_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
  }
  return slab;
}

/// Slabs of simulations that have ended: of 4096 stacks at most, some 8 KB of each in memory.
class KeptSlabs {
 public:
  [[nodiscard]] std::byte* take() {
    const std::lock_guard lock(mutex_);
    if (slabs_.empty()) return nullptr;
    std::byte* slab = slabs_.back();
    slabs_.pop_back();
    return slab;
  }
  [[nodiscard]] bool keep(std::byte* slab) {
    const std::lock_guard lock(mutex_);
    if (slabs_.size() >= 4096 / kStacksPerSlab) return false;
    slabs_.push_back(slab);
    return true;
  }

 private:
  std::mutex mutex_;
  std::vector<std::byte*> slabs_;
};

KeptSlabs& kept_slabs() {
  static auto* slabs = new KeptSlabs;  // never destroyed: simulations may outlive what is static
  return *slabs;
}

}  // namespace

StackPool::~StackPool() {
  for (std::byte* slab : slabs_)
    if (!kept_slabs().keep(slab)) munmap(slab, stride() * kStacksPerSlab);
}

std::byte* StackPool::take() {
  if (free_.empty()) {
    std::byte* slab = kept_slabs().take();
    slabs_.push_back(slab != nullptr ? slab : map_slab());
    for (size_t i = kStacksPerSlab; i-- > 0;)
      free_.push_back(slabs_.back() + i * stride() + page_bytes());
  }
  std::byte* stack = free_.back();
  free_.pop_back();
  return stack;
}

}  // namespace deepep::emu
