// Sixteen float32 lanes in one zmm register.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace internvit::INTERNVIT_ISA {

struct Vec {
  __m512 v;
};
INTERNVIT_INLINE __mmask16 lane_mask(int64_t n) { return __mmask16((1u << n) - 1); }
INTERNVIT_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
INTERNVIT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
INTERNVIT_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
INTERNVIT_INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INTERNVIT_INLINE Vec load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p))}; }
INTERNVIT_INLINE Vec load(const bf16* p, int64_t n) { return {widen(_mm256_maskz_loadu_epi16(lane_mask(n), p))}; }
INTERNVIT_INLINE Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INTERNVIT_INLINE Vec load(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p))};
}
INTERNVIT_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
INTERNVIT_INLINE void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), x.v); }
INTERNVIT_INLINE __m256i narrow_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
#endif
}
INTERNVIT_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x.v)); }
INTERNVIT_INLINE void store(bf16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_bf16(x.v)); }
INTERNVIT_INLINE void store(f16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0)); }
INTERNVIT_INLINE void store(f16* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), _mm512_cvtps_ph(x.v, 0));
}
INTERNVIT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INTERNVIT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
INTERNVIT_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
INTERNVIT_INLINE Vec copy_sign(Vec a, Vec sign) {
  return {_mm512_or_ps(_mm512_abs_ps(a.v), _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
INTERNVIT_INLINE Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, 1)}; }
INTERNVIT_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
INTERNVIT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
INTERNVIT_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
// 1 / a to 24 bits: an estimate of 14 and one Newton step, where a division takes 16 cycles of the divider.
INTERNVIT_INLINE Vec reciprocal_estimate(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
INTERNVIT_INLINE Vec reciprocal(Vec a) {
  const __m512 estimate = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, estimate, _mm512_set1_ps(1.0f)), estimate, estimate)};
}

// Sixteen int32 lanes; in memory at multiples of 64 bytes.
struct Ints {
  __m512i v;
};
INTERNVIT_INLINE Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
INTERNVIT_INLINE Ints load_ints(const int32_t* p) { return {_mm512_load_si512(p)}; }
INTERNVIT_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INTERNVIT_INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
INTERNVIT_INLINE Ints shifted_right(Ints a, int bits) { return {_mm512_srai_epi32(a.v, uint32_t(bits))}; }
INTERNVIT_INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INTERNVIT_INLINE Ints nearest_ints(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }

// Transposes 16 x 16 words of 32 bits held in 16 registers.
INTERNVIT_INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace internvit::INTERNVIT_ISA
