// Sixteen float32 lanes, whatever the instruction set: one zmm register, two ymm, or an array that the compiler
// vectorises as it can. Loads and stores convert from and to the storage types, rounding to nearest even.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#ifndef INTERNVIT_ISA  // an editor that opens a header alone; each unit in cpu/isa names its own
#define INTERNVIT_ISA generic
#endif

namespace internvit::INTERNVIT_ISA {

#define INTERNVIT_INLINE inline __attribute__((always_inline))
// Of long functions. Without AVX2 a vector is four registers and an operation many instructions: inlined everywhere, and
// with loops unrolled (for_lanes), that unit took 51 s to compile instead of 18.
#if defined(__AVX2__)
#define INTERNVIT_INLINE_LONG INTERNVIT_INLINE
#else
#define INTERNVIT_INLINE_LONG __attribute__((noinline))
#endif

constexpr int64_t kLanes = 16;

INTERNVIT_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INTERNVIT_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

INTERNVIT_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
INTERNVIT_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

INTERNVIT_INLINE float to_float(float x) { return x; }
INTERNVIT_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
INTERNVIT_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = float(magnitude) * (1.0f / 16777216.0f);  // subnormal: a multiple of 2^-24
  return bits_to_float(sign | float_to_bits(tiny));
}

INTERNVIT_INLINE void from_float(float x, float* out) { *out = x; }
INTERNVIT_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(bits >> 16 | 0x40)
                                               : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INTERNVIT_INLINE void from_float(float x, f16* out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  } else if (magnitude >= 0x477ff000) {
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits
    out->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

#if defined(__AVX512F__)

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

#else

#if defined(__AVX2__)

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

#else

typedef float Lanes __attribute__((vector_size(64)));  // GCC and Clang split it into what the machine has
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

struct Vec {
  Lanes v;
};
INTERNVIT_INLINE Vec broadcast(float x) { return {Lanes{} + x}; }
INTERNVIT_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, 64);
  return x;
}
INTERNVIT_INLINE Vec load(const bf16* p) {
  HalfLanes bits;
  __builtin_memcpy(&bits, p, 32);
  return {(Lanes)(__builtin_convertvector(bits, BitLanes) << 16)};
}
INTERNVIT_INLINE_LONG void load_f16(const f16* p, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = to_float(p[i]);
}
INTERNVIT_INLINE_LONG void store_f16(f16* p, const float* x) {
  for (int i = 0; i < 16; ++i) from_float(x[i], p + i);
}
INTERNVIT_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, 64); }
INTERNVIT_INLINE Vec load(const f16* p) {
  float lanes[16];
  load_f16(p, lanes);
  return load(lanes);
}
INTERNVIT_INLINE_LONG void store(bf16* p, Vec x) {
  const BitLanes bits = (BitLanes)x.v, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = (BitLanes)(x.v != x.v);
  const HalfLanes halves = __builtin_convertvector(((nan & (bits | 0x400000)) | (~nan & rounded)) >> 16, HalfLanes);
  __builtin_memcpy(p, &halves, 32);
}
INTERNVIT_INLINE void store(f16* p, Vec x) {
  float lanes[16];
  store(lanes, x);
  store_f16(p, lanes);
}
INTERNVIT_INLINE Lanes choose(IntLanes condition, Lanes yes, Lanes no) {
  return (Lanes)((condition & (IntLanes)yes) | (~condition & (IntLanes)no));
}
INTERNVIT_INLINE Vec operator+(Vec x, Vec y) { return {x.v + y.v}; }
INTERNVIT_INLINE Vec operator-(Vec x, Vec y) { return {x.v - y.v}; }
INTERNVIT_INLINE Vec operator*(Vec x, Vec y) { return {x.v * y.v}; }
INTERNVIT_INLINE Vec operator/(Vec x, Vec y) { return {x.v / y.v}; }
INTERNVIT_INLINE Vec fma(Vec x, Vec y, Vec z) { return {x.v * y.v + z.v}; }
INTERNVIT_INLINE Vec max(Vec x, Vec y) { return {choose(x.v > y.v, x.v, y.v)}; }
INTERNVIT_INLINE Vec min(Vec x, Vec y) { return {choose(x.v < y.v, x.v, y.v)}; }
INTERNVIT_INLINE Vec abs(Vec x) { return {(Lanes)((BitLanes)x.v & 0x7fffffffu)}; }
INTERNVIT_INLINE Vec copy_sign(Vec x, Vec sign) {
  return {(Lanes)(((BitLanes)x.v & 0x7fffffffu) | ((BitLanes)sign.v & 0x80000000u))};
}
INTERNVIT_INLINE Vec floor(Vec x) {
  const IntLanes whole = ~(abs(x).v < Lanes{} + 8388608.0f);  // or NaN
  const Lanes inside = choose(whole, Lanes{}, x.v);           // converting what no int32 holds is undefined
  const Lanes truncated = __builtin_convertvector(__builtin_convertvector(inside, IntLanes), Lanes);
  return {choose(whole, x.v, truncated + __builtin_convertvector(truncated > inside, Lanes))};
}
INTERNVIT_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Vec exponent = min(broadcast(128.0f), max(broadcast(-127.0f), n));
  const Lanes known = choose(exponent.v == exponent.v, exponent.v, Lanes{});
  return {x.v * (Lanes)((__builtin_convertvector(known, IntLanes) + 127) << 23)};
}
INTERNVIT_INLINE Vec reciprocal(Vec x) { return broadcast(1.0f) / x; }
INTERNVIT_INLINE Vec reciprocal_estimate(Vec x) { return reciprocal(x); }
#endif

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

#if defined(__AVX512F__)
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

// Calls body(begin, end) over ranges of [0, n).
template <class Body>
void parallel(const Executor& executor, int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  executor.parallel_for(
      n, grain, [](void* state, int64_t begin, int64_t end) { (*static_cast<const Body*>(state))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many lanes of a vector a row still fills.
struct AllLanes {};
struct SomeLanes {
  int64_t n;
};
template <class T>
INTERNVIT_INLINE Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
INTERNVIT_INLINE Vec load(const T* p, SomeLanes lanes) {
  return load(p, lanes.n);
}
template <class T>
INTERNVIT_INLINE void store(T* p, Vec x, AllLanes) {
  store(p, x);
}
template <class T>
INTERNVIT_INLINE void store(T* p, Vec x, SomeLanes lanes) {
  store(p, x, lanes.n);
}

// Calls body(c, lanes, u) for each vector of [0, n), u counting 0 to 3: a sum keeps four accumulators, which hides the
// latency of the addition and halves the rounding error of one.
template <class Body>
INTERNVIT_INLINE void for_lanes(int64_t n, Body body) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
    body(c, AllLanes{}, 0);
    body(c + kLanes, AllLanes{}, 1);
    body(c + 2 * kLanes, AllLanes{}, 2);
    body(c + 3 * kLanes, AllLanes{}, 3);
  }
  for (; c + kLanes <= n; c += kLanes) body(c, AllLanes{}, 0);
#else
  const int64_t fours = n / (4 * kLanes) * (4 * kLanes);
  for (; c + kLanes <= n; c += kLanes) body(c, AllLanes{}, c < fours ? int(c / kLanes % 4) : 0);
#endif
  if (c < n) body(c, SomeLanes{n - c}, 1);
}
#define INTERNVIT_BODY(c, lanes, u) [&](int64_t c, auto lanes, int u) __attribute__((always_inline))

struct Sum {
  Vec part[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  INTERNVIT_INLINE float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// Runs the body with T naming the storage type.
#define INTERNVIT_DISPATCH(dtype, T, ...) \
  do {                                    \
    if ((dtype) == kFloat32) {            \
      using T = float;                    \
      __VA_ARGS__;                        \
    } else if ((dtype) == kBFloat16) {    \
      using T = bf16;                     \
      __VA_ARGS__;                        \
    } else {                              \
      using T = f16;                      \
      __VA_ARGS__;                        \
    }                                     \
  } while (false)

// Rows a thread should have before another one pays: 16K elements are about 2 us of work.
INTERNVIT_INLINE int64_t row_grain(int64_t channels) { return channels < 16384 ? 16384 / channels : 1; }

}  // namespace internvit::INTERNVIT_ISA
