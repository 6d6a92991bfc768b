// Sixteen float32 lanes in two ymm registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace internvit::INTERNVIT_ISA {

struct Vec {
  __m256 a, b;
};
INTERNVIT_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INTERNVIT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INTERNVIT_INLINE __m256 widen(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INTERNVIT_INLINE Vec load(const bf16* p) { return {widen(p), widen(p + 8)}; }
INTERNVIT_INLINE Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
INTERNVIT_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INTERNVIT_INLINE __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
INTERNVIT_INLINE void store(bf16* p, Vec x) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(x.a), round_to_bf16(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INTERNVIT_INLINE void store(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, 0));
}
INTERNVIT_INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INTERNVIT_INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INTERNVIT_INLINE Vec copy_sign(Vec x, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, x.a), _mm256_and_ps(bit, sign.a)),
          _mm256_or_ps(_mm256_andnot_ps(bit, x.b), _mm256_and_ps(bit, sign.b))};
}
INTERNVIT_INLINE Vec abs(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INTERNVIT_INLINE Vec floor(Vec x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
INTERNVIT_INLINE __m256 power_of_two(__m256 n) {
  n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(128.0f));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INTERNVIT_INLINE Vec scale_by_power(Vec x, Vec n) {
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
INTERNVIT_INLINE Vec reciprocal(Vec x) { return broadcast(1.0f) / x; }
INTERNVIT_INLINE Vec reciprocal_estimate(Vec x) { return reciprocal(x); }

// Transposes 8 x 8 words of 32 bits held in 8 registers.
INTERNVIT_INLINE void transpose_words(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// Six rows of eight words of 32 bits as columns: out [8][6].
INTERNVIT_INLINE void store_columns(const __m256 (&row)[6], float* out) {
  __m256d low[3], high[3];  // of two rows, the words 0, 1, 4, 5 and 2, 3, 6, 7 side by side
  for (int i = 0; i < 3; ++i) {
    low[i] = _mm256_castps_pd(_mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]));
    high[i] = _mm256_castps_pd(_mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]));
  }
  const __m256d fours[4] = {_mm256_unpacklo_pd(low[0], low[1]), _mm256_unpackhi_pd(low[0], low[1]),
                            _mm256_unpacklo_pd(high[0], high[1]), _mm256_unpackhi_pd(high[0], high[1])};
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k, out += 6) {
    const __m256d four = fours[k % 4], two = k % 4 < 2 ? low[2] : high[2];
    const __m128d left = k < 4 ? _mm256_castpd256_pd128(four) : _mm256_extractf128_pd(four, 1);
    const __m128d right = k < 4 ? _mm256_castpd256_pd128(two) : _mm256_extractf128_pd(two, 1);
    _mm_storeu_ps(out, _mm_castpd_ps(left));
    if (k % 2) {
      _mm_storeh_pi((__m64*)(out + 4), _mm_castpd_ps(right));
    } else {
      _mm_storel_pi((__m64*)(out + 4), _mm_castpd_ps(right));
    }
  }
}

// Sixteen int32 lanes; in memory at multiples of 32 bytes.
struct Ints {
  __m256i a, b;
};
INTERNVIT_INLINE Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INTERNVIT_INLINE Ints load_ints(const int32_t* p) {
  return {_mm256_load_si256((const __m256i*)p), _mm256_load_si256((const __m256i*)p + 1)};
}
INTERNVIT_INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INTERNVIT_INLINE Ints operator*(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
INTERNVIT_INLINE Ints shifted_right(Ints x, int bits) {
  return {_mm256_srai_epi32(x.a, bits), _mm256_srai_epi32(x.b, bits)};
}
INTERNVIT_INLINE Vec to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INTERNVIT_INLINE Ints nearest_ints(Vec x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

}  // namespace internvit::INTERNVIT_ISA
