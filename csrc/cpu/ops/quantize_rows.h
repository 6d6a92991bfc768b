// Rows as int8 or float8_e4m3fn with a scale and a zero point each: x = x_scale * (x_q - x_zero).
//
//   symmetric: scale = max |x| / 127, of float8 / 448, zero = 0;  else with low = min(x, 0), high = max(x, 0):
//   scale = (high - low) / 255, zero = round(-low / scale) - 128;  x_q = round(x / scale) + zero, to nearest even
//
// Divisions by the scale are products with its inverse, steps / range. A row with a value that is not finite has a
// scale of NaN, so that what is computed from it is not finite either. A row of a range below kLeast is zero: its
// inverse would not be finite.
#pragma once

#include "cpu/ops/gelu.h"

namespace internvit::INTERNVIT_ISA {

constexpr float kLeast = 1e-30f, kLargestE4M3 = 448.0f;

struct RowQuantization {
  float inverse, scale;
  int32_t zero;

  RowQuantization(float low, float high, bool symmetric, float largest = 127.0f) {
    const float range = symmetric ? (-low > high ? -low : high) : high - low, steps = symmetric ? largest : 255.0f;
    const bool finite = range < bits_to_float(0x7f800000);
    inverse = finite && range >= kLeast ? steps / range : 0.0f;
    scale = !finite ? bits_to_float(0x7fc00000) : range < kLeast ? 0.0f : range / steps;
    zero = symmetric || inverse == 0.0f ? 0 : int32_t(__builtin_rintf(-low * inverse)) - 128;
  }
};

template <class T>
INTERNVIT_INLINE RowQuantization quantization_of(const T* x, int64_t channels, bool symmetric, float largest = 127.0f) {
  Vec low[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  Vec high[4] = {low[0], low[0], low[0], low[0]};
  Sum not_finite;  // x - x is NaN for NaN and infinity; min and max drop NaN
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
    const Vec value = load(x + c, lanes);
    low[u] = min(low[u], value);
    high[u] = max(high[u], value);
    not_finite.part[u] = not_finite.part[u] + (value - value);
  });
  const Vec least = min(min(low[0], low[1]), min(low[2], low[3]));
  const float smallest = -max_lane(broadcast(0.0f) - least);
  const float largest_value = max_lane(max(max(high[0], high[1]), max(high[2], high[3])));
  return {smallest, largest_value + not_finite.total(), symmetric, largest};
}

// The nearest integers plus zero, clamped to int8; NaN, as in a row that is not finite, whose inverse is 0, gives zero.
#if defined(__AVX512F__)
INTERNVIT_INLINE void store_int8(int8_t* p, Vec x, int32_t zero, int64_t n) {
  const __m512i whole = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), x.v);
  const __m512i shifted = _mm512_add_epi32(whole, _mm512_set1_epi32(zero));
  _mm_mask_storeu_epi8(p, lane_mask(n), _mm512_cvtsepi32_epi8(shifted));
}
#elif defined(__AVX2__)
INTERNVIT_INLINE __m256i whole_numbers(__m256 x, __m256i zero) {
  const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_add_epi32(_mm256_and_si256(ordered, _mm256_cvtps_epi32(x)), zero);
}
INTERNVIT_INLINE void store_int8(int8_t* p, Vec x, int32_t zero, int64_t n) {
  const __m256i zeros = _mm256_set1_epi32(zero);
  const __m256i packed = _mm256_packs_epi32(whole_numbers(x.a, zeros), whole_numbers(x.b, zeros));
  const __m256i halves = _mm256_permute4x64_epi64(packed, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  if (n == kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  int8_t lanes[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), bytes);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#else
INTERNVIT_INLINE_LONG void store_int8(int8_t* p, Vec x, int32_t zero, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t whole = (lanes[i] == lanes[i] ? int32_t(__builtin_rintf(lanes[i])) : 0) + zero;
    p[i] = int8_t(whole < -128 ? -128 : whole > 127 ? 127 : whole);
  }
}
#endif

// The nearest float8_e4m3fn, ties to even, at most 448: sign, 4 bits of exponent with a bias of 7, 3 of mantissa. NaN
// gives 0. Below 2^-6 values are multiples of 2^-9: adding 2^14 leaves the multiple in the low bits.
INTERNVIT_INLINE uint8_t to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0;
  const float size = bits_to_float(magnitude);
  uint32_t code = 0x7e;
  if (size < 0.015625f) {
    code = float_to_bits(size + 16384.0f) - float_to_bits(16384.0f);
  } else if (size < kLargestE4M3) {
    code = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  }
  return uint8_t(bits >> 24 & 0x80) | uint8_t(code);
}

__attribute__((noinline)) void store_e4m3(uint8_t* p, Vec x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = to_e4m3(lanes[i]);
}

template <class T>
INTERNVIT_INLINE void quantize_row(const T* x, int64_t channels, const RowQuantization& row, int8_t* x_q) {
  const Vec inverse = broadcast(row.inverse);
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
    store_int8(x_q + c, load(x + c, lanes) * inverse, row.zero, min_of(kLanes, channels - c));
  });
}

// Row i of `out`, from x.
template <class T>
INTERNVIT_INLINE void quantize_row_into(const QuantizedRows& out, int64_t i, const T* x, int64_t channels) {
  const bool int8 = out.dtype == kInt8;
  const RowQuantization row = quantization_of(x, channels, out.symmetric, int8 ? 127.0f : kLargestE4M3);
  out.x_scale[i] = row.scale;
  out.x_zero[i] = row.zero;
  if (int8) return quantize_row(x, channels, row, static_cast<int8_t*>(out.x_q) + i * channels);
  uint8_t* x_q = static_cast<uint8_t*>(out.x_q) + i * channels;
  const Vec inverse = broadcast(row.inverse);
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
    store_e4m3(x_q + c, load(x + c, lanes) * inverse, min_of(kLanes, channels - c));
  });
}

template <class T>
void quantize_rows_as(const QuantizeRowsParams& p, const Executor& executor) {
  parallel(executor, p.rows, row_grain(p.channels), [&](int64_t begin, int64_t end) {
    float* values = p.gelu ? static_cast<float*>(executor.scratch(p.channels * int64_t(sizeof(float)))) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
      if (!p.gelu) {
        quantize_row_into(p.quantized, i, x, p.channels);
        continue;
      }
      for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) { store(values + c, gelu_of<float>(load(x + c, lanes)), lanes); });
      quantize_row_into(p.quantized, i, values, p.channels);
    }
  });
}

void quantize_rows(const QuantizeRowsParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, quantize_rows_as<T>(p, executor));
}

}  // namespace internvit::INTERNVIT_ISA
