// Sixteen float32 lanes, whatever the instruction set: one zmm register, two ymm, or an array that the compiler
// vectorises as it can. Loads and stores convert from and to the storage types, rounding to nearest even.
#pragma once

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.h"
#else
#include "cpu/simd/vec_generic.h"
#endif

namespace internvit::INTERNVIT_ISA {

#if !defined(__AVX512F__)  // which has masks and reductions
template <class T>
INTERNVIT_INLINE Vec load(const T* p, int64_t n) {
  T lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
INTERNVIT_INLINE void store(T* p, Vec x, int64_t n) {
  T lanes[16];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
INTERNVIT_INLINE float sum(Vec x) {
  float lanes[16];
  store(lanes, x);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
INTERNVIT_INLINE float max_lane(Vec x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 1; i < 16; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
#endif

// out [columns, rows] = in^T, both multiples of 16.
INTERNVIT_INLINE void transpose(int64_t rows, int64_t columns, const float* in, int64_t in_row, float* out,
                                int64_t out_row) {
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; j += 16) {
      const float* from = in + i * in_row + j;
      float* to = out + j * out_row + i;
#if defined(__AVX512F__)
      __m512i r[16];
      for (int64_t n = 0; n < 16; ++n) r[n] = _mm512_loadu_si512(from + n * in_row);
      transpose_words(r);
      for (int64_t n = 0; n < 16; ++n) _mm512_storeu_si512(to + n * out_row, r[n]);
#else
      for (int64_t n = 0; n < 16; ++n)
        for (int64_t m = 0; m < 16; ++m) to[m * out_row + n] = from[n * in_row + m];
#endif
    }
  }
}

// x as the storage type T would keep it.
template <class T>
INTERNVIT_INLINE Vec rounded(Vec x) {
  T lanes[16];
  store(lanes, x);
  return load(lanes);
}
template <>
INTERNVIT_INLINE Vec rounded<float>(Vec x) {
  return x;
}

// 2^x to 1e-8, for x in the float32 range; 0 below it.
INTERNVIT_INLINE_LONG Vec exp2_float32(Vec x) {
  const Vec n = floor(x + broadcast(0.5f)), f = x - n;
  Vec p = fma(broadcast(1.53458110e-4f), f, broadcast(1.33999309e-3f));
  p = fma(p, f, broadcast(9.61848907e-3f));
  p = fma(p, f, broadcast(5.55032864e-2f));
  p = fma(p, f, broadcast(2.40226462e-1f));
  p = fma(p, f, broadcast(6.93147182e-1f));
  return scale_by_power(fma(p, f, broadcast(1.0f)), n);
}

// 2^x to 7.5e-5, an eighth of bf16's half ulp: three terms over [0, 1).
INTERNVIT_INLINE_LONG Vec exp2_bf16(Vec x) {
#if defined(__AVX512F__)
  const Vec n = x, f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};  // scalef takes the floor itself
#else
  const Vec n = floor(x), f = x - n;
#endif
  Vec p = fma(broadcast(0.0780244991f), f, broadcast(0.226067185f));
  p = fma(p, f, broadcast(0.695833504f));
  p = fma(p, f, broadcast(0.999925196f));
  return scale_by_power(p, n);
}

}  // namespace internvit::INTERNVIT_ISA
