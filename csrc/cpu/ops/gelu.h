// The exact GELU and its derivative, of the pre-activation as stored.
//
//   gelu(z) = z Phi(z) = max(z, 0) - |z| Q(|z|),  Q(a) = erfc(a / sqrt(2)) / 2 = exp(-a^2 / 2) R(1 / (1 + c a))
//   gelu'(z) = Phi(z) + z exp(-z^2 / 2) / sqrt(2 pi)
//
// R is a polynomial fitted for the least relative error: 1e-8 for float32, 2e-6 for float16, 1e-5 for bfloat16. So the
// negative tail keeps its digits, which z (1 + erf) / 2 loses.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

struct GeluParts {
  Vec tail;      // Q(|z|)
  Vec gaussian;  // exp(-z^2 / 2)
};

template <class T>
struct GeluFit;  // c and the coefficients of R, highest first
template <>
struct GeluFit<float> {
  static constexpr float c = 0.33f;
  static constexpr float r[] = {-0.0261072877f, 0.149803736f, -0.325071533f, 0.295118414f, -0.109551128f,
                                0.147302035f,   0.103260786f, 0.133769263f,  0.131468936f, 6.78320019e-06f};
};
template <>
struct GeluFit<f16> {
  static constexpr float c = 0.30f;
  static constexpr float r[] = {-0.0845930932f, 0.240572196f, -0.0486433852f,  0.164763555f,
                                0.10670497f,    0.121274595f, -7.97792693e-05f};
};
template <>
struct GeluFit<bf16> {
  static constexpr float c = 0.36f;
  static constexpr float r[] = {-0.098516029f, 0.254388357f, 0.0351156186f, 0.168696081f, 0.140124017f, 1.912933e-4f};
};

template <class T>
INTERNVIT_INLINE GeluParts gelu_parts(Vec magnitude) {
  constexpr bool kCoarse = __is_same(T, bf16);  // 14 bits of 1 / x and of the exponential: 19 operations, not 30
  const Vec denominator = fma(magnitude, broadcast(GeluFit<T>::c), broadcast(1.0f));
  const Vec t = kCoarse ? reciprocal_estimate(denominator) : reciprocal(denominator);
  Vec r = broadcast(GeluFit<T>::r[0]);
  for (uint64_t i = 1; i < sizeof(GeluFit<T>::r) / sizeof(float); ++i) r = fma(r, t, broadcast(GeluFit<T>::r[i]));
  const Vec exponent = magnitude * magnitude * broadcast(-0.72134752f);
  const Vec gaussian = kCoarse ? exp2_bf16(exponent) : exp2_float32(exponent);
  return {gaussian * r, gaussian};
}

// Q is 0 in float32 beyond this, and z^2 stays finite. min and max return their second operand for NaN: z comes second.
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
