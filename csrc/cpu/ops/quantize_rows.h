// Rows as int8 with a scale and a zero point each, for units with AVX-512: x = x_scale * (x_q - x_zero).
//
//   symmetric: scale = max |x| / 127, zero = 0;  else with low = min(x, 0), high = max(x, 0):
//   scale = (high - low) / 255, zero = round(-low / scale) - 128;  x_q = round(x / scale) + zero, to nearest even
//
// Divisions by the scale are products with its inverse, steps / range. A row with a value that is not finite has a
// scale of NaN, so that what is computed from it is not finite either. A row of a range below kLeast is zero: its
// inverse would not be finite.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

constexpr float kLeast = 1e-30f;

struct RowQuantization {
  float inverse, scale;
  int32_t zero;

  RowQuantization(float low, float high, bool symmetric) {
    const float range = symmetric ? (-low > high ? -low : high) : high - low, steps = symmetric ? 127.0f : 255.0f;
    const bool finite = range < bits_to_float(0x7f800000);
    inverse = finite && range >= kLeast ? steps / range : 0.0f;
    scale = !finite ? bits_to_float(0x7fc00000) : range < kLeast ? 0.0f : range / steps;
    zero = symmetric || inverse == 0.0f ? 0 : int32_t(__builtin_rintf(-low * inverse)) - 128;
  }
};

template <class T>
INTERNVIT_INLINE RowQuantization quantization_of(const T* x, int64_t channels, bool symmetric) {
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
  const float largest = max_lane(max(max(high[0], high[1]), max(high[2], high[3])));
  return {smallest, largest + not_finite.total(), symmetric};
}

template <class T>
INTERNVIT_INLINE void quantize_row(const T* x, int64_t channels, const RowQuantization& row, int8_t* x_q) {
  const Vec inverse = broadcast(row.inverse);
  const __m512i zero = _mm512_set1_epi32(row.zero);
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
    // inverse is 0 in a row that is not finite, and NaN times it is no integer.
    const Vec value = load(x + c, lanes) * inverse;
    const __m512i whole = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(value.v, value.v, _CMP_ORD_Q), value.v);
    const __mmask16 mask = lane_mask(min_of(kLanes, channels - c));
    _mm_mask_storeu_epi8(x_q + c, mask, _mm512_cvtsepi32_epi8(_mm512_add_epi32(whole, zero)));
  });
}

void quantize_rows(const QuantizeRowsParams& p, const Executor& executor) {
  parallel(executor, p.rows, row_grain(p.channels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      INTERNVIT_DISPATCH(p.dtype, T, {
        const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
        const RowQuantization row = quantization_of(x, p.channels, p.symmetric);
        quantize_row(x, p.channels, row, p.x_q + i * p.channels);
        p.x_scale[i] = row.scale;
        p.x_zero[i] = row.zero;
      });
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
