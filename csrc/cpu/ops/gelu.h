// The exact GELU and its derivative, of the pre-activation as stored (the formula: common/gelu_fit.h), as
//
//   gelu(z) = max(z, 0) - |z| Phi(-|z|)
#pragma once

#include "common/gelu_fit.h"
#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

struct GeluParts {
  Vec tail;      // Phi(-|z|)
  Vec gaussian;  // exp(-z^2 / 2)
};

template <class T>
INTERNVIT_INLINE GeluParts gelu_parts(Vec magnitude) {
  constexpr bool kCoarse = __is_same(T, bf16);  // 14 bits of 1 / x and of the exponential: 19 operations, not 30
  constexpr GeluFit<T> kFit;
  const Vec denominator = fma(magnitude, broadcast(kFit.c), broadcast(1.0f));
  const Vec t = kCoarse ? reciprocal_estimate(denominator) : reciprocal(denominator);
  Vec r = broadcast(kFit.r[0]);
  for (uint64_t i = 1; i < sizeof(kFit.r) / sizeof(float); ++i) r = fma(r, t, broadcast(kFit.r[i]));
  const Vec exponent = magnitude * magnitude * broadcast(-0.72134752f);
  const Vec gaussian = kCoarse ? exp2_bf16(exponent) : exp2_float32(exponent);
  return {gaussian * r, gaussian};
}

// The tail is 0 in float32 beyond this, and z^2 stays finite. min and max return their second operand for NaN: z comes
// second.
constexpr float kGeluEnd = 14.5f;

template <class T>
INTERNVIT_INLINE Vec gelu_of(Vec z) {
  const Vec a = min(broadcast(kGeluEnd), abs(z));
  return max(broadcast(0.0f), z) - a * gelu_parts<T>(a).tail;
}

template <class T>
INTERNVIT_INLINE Vec gelu_slope(Vec z) {
  const Vec a = min(broadcast(kGeluEnd), abs(z)), half = broadcast(0.5f);
  const GeluParts parts = gelu_parts<T>(a);
  const Vec odd = fma(a * parts.gaussian, broadcast(0.3989422804f), half - parts.tail);  // of gelu' - 1/2
  return half + copy_sign(odd, z);
}

template <class T>
void gelu_elements(const GeluParams& p, const Executor& executor) {
  const T* z = static_cast<const T*>(p.pre_activation);
  T* y = static_cast<T*>(p.y);
  const int64_t blocks = (p.size + 1023) / 1024;
  parallel(executor, blocks, 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 1024, n = min_of(end * 1024, p.size) - first;
    if (p.grad_y) {
      const T* grad = static_cast<const T*>(p.grad_y) + first;
      for_lanes(n, INTERNVIT_BODY(c, lanes, u) {
        store(y + first + c, load(grad + c, lanes) * gelu_slope<T>(load(z + first + c, lanes)), lanes);
      });
    } else {
      for_lanes(n, INTERNVIT_BODY(c, lanes, u) { store(y + first + c, gelu_of<T>(load(z + first + c, lanes)), lanes); });
    }
  });
}

void gelu(const GeluParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, gelu_elements<T>(p, executor));
}

}  // namespace internvit::INTERNVIT_ISA
