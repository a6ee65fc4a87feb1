// The environment of a process on the wire, and its end when something must not happen.
#pragma once

namespace loopverbs {

/// A number of the environment, or `otherwise`.
[[nodiscard]] long setting(const char* name, long otherwise);

/// Prints "loopverbs: ..." and aborts: for what a correct program cannot cause.
[[noreturn, gnu::format(printf, 1, 2)]] void die(const char* format, ...);

}  // namespace loopverbs
