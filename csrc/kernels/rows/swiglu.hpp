// silu(gate) * up of rows [gate, up]. A block a row, 8 channels a thread.
//
// Phases:
//   multiply_gates  in fp32, rounded once
#pragma once

#include "kernels/rows/args.hpp"
#include "kernels/rows/silu.hpp"

namespace deepep::kernels {

[[nodiscard]] DEEPEP_DEVICE float swiglu(float gate, float up) {
  using namespace dev;
  return mul_rounded(mul_rounded(gate, logistic(gate)), up);
}

DEEPEP_DEVICE void multiply_gates(const SwigluArgs& args) {
  using namespace dev;
  const int pieces = static_cast<int>(args.width / 8);
  for (int64_t row = block(); row < args.num_rows; row += num_blocks()) {
    const Vec16* gates = reinterpret_cast<const Vec16*>(args.h) + 2 * row * pieces;
    Vec16* out = reinterpret_cast<Vec16*>(args.out) + row * pieces;
    for (int piece = thread(); piece < pieces; piece += num_threads()) {
      const Vec16 gate = load_once(gates + piece), up = load_once(gates + pieces + piece);
      Vec16 made;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        made.w[i] = pack_bf16(swiglu(bf16_low(gate.w[i]), bf16_low(up.w[i])),
                              swiglu(bf16_high(gate.w[i]), bf16_high(up.w[i])));
      store(out + piece, made);
    }
  }
}

DEEPEP_KERNEL(swiglu_kernel, SwigluArgs, kRowThreads) { multiply_gates(args); }

}  // namespace deepep::kernels
