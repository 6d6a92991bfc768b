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
  float largest = 0;
  for (int64_t n = 0; n < p.keys; ++n) {
    const bf16* k = token<bf16>(p.k, b, n, h);
    Sum squares;
    const Vec shrink = broadcast(kShrink);
    for_lanes(p.head_dim, INTERNVIT_BODY(c, lanes, u) {
      const Vec x = load(k + c, lanes) * shrink;
      squares.part[u] = fma(x, x, squares.part[u]);
    });
    s.key_scale[n] = p.rstd_k ? p.rstd_k[b * p.keys + n] : p.scale * kLog2E;
    const float norm = __builtin_sqrtf(squares.total()) * (1 / kShrink) * __builtin_fabsf(s.key_scale[n]);
    largest = norm > largest || norm != norm ? norm : largest;
  }
  for (int64_t n = p.keys; n < s.groups * kGroup; ++n) s.key_scale[n] = 0;
  return largest;
}

// q' of one token, 32 elements at out + d * step for each d; returns |q'|.
template <class Params>
INTERNVIT_INLINE float fold_query(const Params& p, int64_t b, int64_t h, int64_t t, int64_t depth, bf16* out,
                                  int64_t step) {
  const float factor = p.scale * kLog2E;
  Vec squares = broadcast(0.0f);
  for (int64_t d = 0; d < depth; ++d) {
    Vec part[2] = {broadcast(0.0f), broadcast(0.0f)};
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t c = d * 32 + half * 16, n = min_of(16, p.head_dim - c);
      if (n <= 0) continue;
      Vec x = load(token<bf16>(p.q, b, t, h) + c, n);
      if (p.q_weight) {
        const int64_t channel = h * p.head_dim + c;
        x = x * broadcast(p.rstd_q[b * p.tokens + t] * factor) * load(p.q_weight + channel, n) *
            load(p.k_weight + channel, n);
      }
      const Vec small = x * broadcast(kShrink);
      squares = fma(small, small, squares);
      part[half] = x;
    }
    _mm512_store_si512(out + d * step, narrow_pair(part[0], part[1]));
  }
  return __builtin_sqrtf(sum(squares)) * (1 / kShrink);
}

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
