// The gradient of silu(gate) * up (swiglu.hpp) with respect to rows [gate, up].
//
// Phases:
//   differentiate_gates  in fp32, rounded once
#pragma once

#include "kernels/rows/args.hpp"
#include "kernels/rows/silu.hpp"

namespace deepep::kernels {

struct GateGradients {
  float gate;
  float up;
};

[[nodiscard]] DEEPEP_DEVICE GateGradients swiglu_gradients(float gate, float up, float grad) {
  using namespace dev;
  const float s = logistic(gate);
  // d silu = s (1 + gate (1 - s))
  const float slope = mul_rounded(s, add_rounded(1.0f, mul_rounded(gate, add_rounded(1.0f, -s))));
  return {mul_rounded(mul_rounded(grad, up), slope), mul_rounded(grad, mul_rounded(gate, s))};
}

DEEPEP_DEVICE void differentiate_gates(const SwigluArgs& args) {
  using namespace dev;
  const int pieces = static_cast<int>(args.width / 8);
  for (int64_t row = block(); row < args.num_rows; row += num_blocks()) {
    const Vec16* gates = reinterpret_cast<const Vec16*>(args.h) + 2 * row * pieces;
    const Vec16* grads = reinterpret_cast<const Vec16*>(args.grad) + row * pieces;
    Vec16* out = reinterpret_cast<Vec16*>(args.out) + 2 * row * pieces;
    for (int piece = thread(); piece < pieces; piece += num_threads()) {
      const Vec16 gate = load_once(gates + piece), up = load_once(gates + pieces + piece);
      const Vec16 grad = load_once(grads + piece);
      Vec16 by_gate, by_up;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const GateGradients low =
            swiglu_gradients(bf16_low(gate.w[i]), bf16_low(up.w[i]), bf16_low(grad.w[i]));
        const GateGradients high =
            swiglu_gradients(bf16_high(gate.w[i]), bf16_high(up.w[i]), bf16_high(grad.w[i]));
        by_gate.w[i] = pack_bf16(low.gate, high.gate);
        by_up.w[i] = pack_bf16(low.up, high.up);
      }
      store(out + piece, by_gate);
      store(out + pieces + piece, by_up);
    }
  }
}

DEEPEP_KERNEL(swiglu_backward_kernel, SwigluArgs, kRowThreads) { differentiate_gates(args); }

}  // namespace deepep::kernels
