// Layout rules and the gradient codec as custom calls of XLA, on the CPU: inside a jit of JAX without Python.
// Built against jax's headers, which need nothing else (docs/interop.md); a handler is a symbol of the library.
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <string_view>

#include "layout/rules/gradients.hpp"
#include "layout/rules/layout.hpp"
#include "xla/ffi/api/ffi.h"

namespace deepep::xla_calls {

namespace ffi = ::xla::ffi;
using host::GradientFormat;

/// What a rule refuses reaches the caller of the jit in its own words.
template <class Call>
ffi::Error guarded(const Call& call) {
  try {
    call();
    return ffi::Error::Success();
  } catch (const std::exception& problem) {
    return ffi::Error::InvalidArgument(problem.what());
  }
}

std::optional<GradientFormat> format_of(std::string_view name) {
  if (name == "fp8") return GradientFormat::fp8;
  if (name == "fp16") return GradientFormat::fp16;
  if (name == "bf16") return GradientFormat::bf16;
  return std::nullopt;
}

/// A format, and a message of as many bytes as the values need.
ffi::Error check(std::string_view format, int64_t count, int64_t bytes) {
  const auto found = format_of(format);
  if (!found) return ffi::Error::InvalidArgument("format: allowed: fp8, fp16, bf16");
  const int64_t wanted = host::message_bytes(*found, count);
  if (bytes == wanted) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("message: " + std::to_string(bytes) + " bytes; allowed: " +
                                     std::to_string(wanted));
}

/// topk_idx [T, K] int32 -> per_rank [R] and per_expert [E] int32, is_token_in_rank [T, R] bool; E and R by the
/// results' shapes.
ffi::Error dispatch_layout(ffi::BufferR2<ffi::S32> topk_idx, ffi::ResultBufferR1<ffi::S32> per_rank,
                           ffi::ResultBufferR1<ffi::S32> per_expert,
                           ffi::ResultBufferR2<ffi::PRED> is_token_in_rank) {
  const auto shape = topk_idx.dimensions();
  const auto ranks = static_cast<int64_t>(per_rank->element_count());
  const auto marks = is_token_in_rank->dimensions();
  if (marks[0] != shape[0] || marks[1] != ranks)
    return ffi::Error::InvalidArgument("is_token_in_rank: not [T, R]");
  return guarded([&] {
    const host::Group group{.num_experts = static_cast<int64_t>(per_expert->element_count()),
                            .num_ranks = ranks,
                            .ranks_per_domain = ranks};
    int32_t per_domain = 0;
    host::dispatch_layout<int32_t>({topk_idx.typed_data(), shape[0], shape[1]}, group, per_rank->typed_data(),
                                   &per_domain, per_expert->typed_data(),
                                   reinterpret_cast<uint8_t*>(is_token_in_rank->typed_data()));
  });
}

/// values [N] float32 -> message uint8, rounded to nearest.
ffi::Error encode_gradients(ffi::BufferR1<ffi::F32> values, ffi::ResultBufferR1<ffi::U8> message,
                            std::string_view format) {
  const auto count = static_cast<int64_t>(values.element_count());
  if (auto problem = check(format, count, static_cast<int64_t>(message->element_count())); problem.failure())
    return problem;
  constexpr host::Rounding kToNearest{.is_nearest = true, .first_key = 0, .second_key = 0, .first_index = 0};
  return guarded([&] {
    host::encode(*format_of(format), values.typed_data(), count, kToNearest, message->typed_data());
  });
}

/// The inverse: message uint8 -> values [N] float32.
ffi::Error decode_gradients(ffi::BufferR1<ffi::U8> message, ffi::ResultBufferR1<ffi::F32> values,
                            std::string_view format) {
  const auto count = static_cast<int64_t>(values->element_count());
  if (auto problem = check(format, count, static_cast<int64_t>(message.element_count())); problem.failure())
    return problem;
  return guarded([&] {
    host::decode(*format_of(format), message.typed_data(), count, false, values->typed_data());
  });
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(deepep_dispatch_layout, dispatch_layout,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR2<ffi::PRED>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(deepep_encode_gradients, encode_gradients,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR1<ffi::U8>>()
                                  .Attr<std::string_view>("format"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(deepep_decode_gradients, decode_gradients,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR1<ffi::U8>>()
                                  .Ret<ffi::BufferR1<ffi::F32>>()
                                  .Attr<std::string_view>("format"));

}  // namespace deepep::xla_calls
