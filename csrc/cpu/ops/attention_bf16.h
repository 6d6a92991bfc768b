// What bf16 attention on AMX tiles and on VDPBF16PS share: a head's packed K and V, folded queries, the softmax's
// shift.
//
//   P = exp2(q' k^T * key_scale[j] - shift[i]),  out = P v / sum P
//   without weights: q' = q, key_scale = scale * log2(e)
//   with weights:    q' = q * rstd_q * q_weight * k_weight * scale * log2(e) rounded once, key_scale[j] = rstd_k[j]
//
// There is no maximum to search. |q'| |k| bounds every score, shift = max(1/8, bound - 32) keeps P below 2^32, and P in
// bf16 has float32's range, so nothing is lost unless a row's true maximum lies more than 90 powers of two under its
// bound. That shows in its sum; such rows are computed again with exact maxima.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/norm.h"
#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kGroup = 32;      // keys of two tiles
constexpr float kHeadroom = 32.0f;  // P <= 2^32, so 1e18 * P summed over all keys stays finite
// Where all scores are near 0, P just under 1 has half the rounding error of P just over 1.
constexpr float kLeastShift = 0.125f;
constexpr float kLeastSum = 8.6736173798840355e-19f;  // 2^-60
constexpr float kLargestBound = 16384.0f;             // beyond it the bound is too loose to be used

struct PackedHead {
  bf16 *keys, *values;  // B tiles [group][2][D / 32] and [D / 32][group][2]
  float* key_scale;     // [keys]
  int64_t groups, depth;
  PackedHead(ScratchArena& arena, int64_t n_keys, int64_t head_dim) {
    groups = (n_keys + kGroup - 1) / kGroup;
    depth = (head_dim + 31) / 32;
    keys = arena.take<bf16>(groups * 2 * depth * kTile);
    values = arena.take<bf16>(groups * 2 * depth * kTile);
    key_scale = arena.take<float>(groups * kGroup);
  }
};

// The largest |k| * key_scale of a packed head; NaN where one is.
INTERNVIT_INLINE float largest_key_norm(const PackedHead& s) {
  Vec largest = broadcast(0.0f);
  __mmask16 nan = 0;
  for (int64_t half = 0; half < s.groups * 2; ++half) {
    // VDPBF16PS takes a square below 2^-126 for 0: all that a key can lose is added first.
    __m512 even = _mm512_set1_ps(2e-36f), odd = _mm512_setzero_ps();
    const bf16* keys = s.keys + half * s.depth * kTile;
    for (int64_t k = 0; k < s.depth * 16; k += 2) {
      const __m512bh pair[2] = {(__m512bh)_mm512_load_si512(keys + k * 32),
                                (__m512bh)_mm512_load_si512(keys + k * 32 + 32)};
      even = _mm512_dpbf16_ps(even, pair[0], pair[0]);
      odd = _mm512_dpbf16_ps(odd, pair[1], pair[1]);
    }
    const Vec norm = Vec{_mm512_sqrt_ps(_mm512_add_ps(even, odd))} * abs(load(s.key_scale + half * 16));
    nan |= _mm512_cmp_ps_mask(norm.v, norm.v, _CMP_UNORD_Q);
    largest = max(largest, norm);
  }
  return nan ? __builtin_nanf("") : max_lane(largest);
}

// Packs a head; returns the largest |k| * key_scale.
inline float pack_head(const AttentionParams& p, const PackedHead& s, int64_t b, int64_t h) {
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t n = g * kGroup, left = p.keys - n;
    // Tokens lie 3 C apart: no hardware prefetcher follows. Ask for the next group's lines while this one is packed.
    for (int64_t i = kGroup; i < min_of(2 * kGroup, left); ++i) {
      const char* k = reinterpret_cast<const char*>(token<bf16>(p.k, b, n + i, h));
      const char* v = reinterpret_cast<const char*>(token<bf16>(p.v, b, n + i, h));
      for (int64_t byte = 0; byte < p.head_dim * 2; byte += 64) {
        _mm_prefetch(k + byte, _MM_HINT_T0);
        _mm_prefetch(v + byte, _MM_HINT_T0);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t rows = min_of(16, left - half * 16);
      for (int64_t d = 0; d < s.depth; ++d) {
        const bf16* k = token<bf16>(p.k, b, rows > 0 ? n + half * 16 : n, h) + d * 32;
        pack_columns(k, p.k.stride_n, rows, p.head_dim - d * 32, s.keys + ((g * 2 + half) * s.depth + d) * kTile);
        const int64_t cols = p.head_dim - d * 32 - half * 16;
        const bf16* v = token<bf16>(p.v, b, n, h) + d * 32 + (cols > 0 ? half * 16 : 0);
        pack_depth(v, p.v.stride_n, left, cols, s.values + ((d * s.groups + g) * 2 + half) * kTile);
      }
    }
  }
  for (int64_t n = 0; n < s.groups * kGroup; ++n)
    s.key_scale[n] = n >= p.keys ? 0.0f : p.rstd_k ? p.rstd_k[b * p.keys + n] : p.scale * kLog2E;
  return largest_key_norm(s);
}

// q' of one token, 32 elements at out + d * step for each d; returns its squares, of q' / 64, for query_norm.
template <class Params>
INTERNVIT_INLINE Vec fold_query(const Params& p, int64_t b, int64_t h, int64_t t, int64_t depth, bf16* out,
                                int64_t step) {
  const bf16* q = token<bf16>(p.q, b, t, h);
  const Vec factor = broadcast(p.q_weight ? p.rstd_q[b * p.tokens + t] * (p.scale * kLog2E) : 1.0f);
  const Vec shrink = broadcast(kShrink);
  Vec squares = broadcast(0.0f);
  for (int64_t d = 0; d < depth; ++d) {
    const __mmask32 mask = half_mask(p.head_dim - d * 32);
    __m512i query = _mm512_maskz_loadu_epi16(mask, q + d * 32);
    Vec part[2] = {{widen(_mm512_castsi512_si256(query))}, {widen(_mm512_extracti64x4_epi64(query, 1))}};
    if (p.q_weight) {
      for (int half = 0; half < 2; ++half) {
        const int64_t channel = h * p.head_dim + d * 32 + half * 16;
        const __mmask16 lanes = __mmask16(mask >> half * 16);
        part[half] = part[half] * factor * Vec{_mm512_maskz_loadu_ps(lanes, p.q_weight + channel)} *
                     Vec{_mm512_maskz_loadu_ps(lanes, p.k_weight + channel)};
      }
      query = narrow_pair(part[0], part[1]);
    }
    for (const Vec x : part) squares = fma(x * shrink, x * shrink, squares);
    _mm512_store_si512(out + d * step, query);
  }
  return squares;
}

INTERNVIT_INLINE float query_norm(Vec squares) { return __builtin_sqrtf(sum(squares)) * (1 / kShrink); }

INTERNVIT_INLINE void no_query(int64_t depth, bf16* out, int64_t step) {
  for (int64_t d = 0; d < depth; ++d) _mm512_store_si512(out + d * step, _mm512_setzero_si512());
}

INTERNVIT_INLINE float shift_for(float bound) {
  return bound > kHeadroom + kLeastShift ? bound - kHeadroom : kLeastShift;
}

// A score's share of the softmax, before the division by the sum.
template <bool kExact>
INTERNVIT_INLINE Vec probability(Vec score, Vec key_scale, Vec shift) {
  // The exact maximum was taken of the rounded product: subtract it from that, or a score of 1e37 leaves a rest.
  return exp2_bf16(kExact ? Vec{_mm512_sub_ps(_mm512_mul_round_ps(score.v, key_scale.v, 8), shift.v)}
                          : Vec{_mm512_fmsub_ps(score.v, key_scale.v, shift.v)});
}

INTERNVIT_INLINE uint32_t last_group_mask(int64_t keys, int64_t group) {
  return uint32_t(half_mask(keys - group * kGroup));
}

}  // namespace internvit::INTERNVIT_ISA
