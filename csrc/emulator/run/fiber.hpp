// A thread of the emulated GPU: its own stack, switched to and from by hand. A schedule switches millions of
// times, so a switch saves what the ABI asks for and nothing more.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace deepep::emu {

/// Where a suspended fiber, or the scheduler that runs them, will go on.
struct Context {
  void* stack_pointer = nullptr;
};

/// Saves the running context in `from` and goes on with `to`.
void switch_context(Context& from, Context& to);

/// Stacks, each with an unmapped page below, kept for the next fiber. One per simulation, so not shared by
/// threads; the process keeps those of simulations that have ended for others, up to a limit: to map and unmap
/// them costs as much as a short simulation.
class StackPool {
 public:
  static constexpr size_t kStackBytes = size_t{64} << 10;

  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  [[nodiscard]] std::byte* take();
  void give(std::byte* stack) { free_.push_back(stack); }

 private:
  std::vector<std::byte*> slabs_;
  std::vector<std::byte*> free_;
};

/// A context that will run `entry(argument)` on `stack`. `entry` must never return.
[[nodiscard]] Context make_context(std::byte* stack, void (*entry)(void*), void* argument);

}  // namespace deepep::emu
