// Two vectors of a row, side by side: 32 columns, or as many of them as there are.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

#if defined(__AVX512F__)
INTERNVIT_INLINE __mmask32 half_mask(int64_t n) {
  return n >= 32 ? __mmask32(~0u) : n <= 0 ? __mmask32(0) : __mmask32((1u << n) - 1);
}

INTERNVIT_INLINE __m512i narrow_pair(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(low.v)), narrow_bf16(high.v), 1);
#endif
}

INTERNVIT_INLINE void store_pair(bf16* p, Vec low, Vec high) { _mm512_storeu_si512(p, narrow_pair(low, high)); }
INTERNVIT_INLINE void store_pair(float* p, Vec low, Vec high) {
  store(p, low);
  store(p + kLanes, high);
}

using PairLanes = __mmask32;
INTERNVIT_INLINE PairLanes pair_lanes(int64_t n) { return half_mask(n); }
INTERNVIT_INLINE void load_pair(const bf16* p, PairLanes lanes, Vec* low, Vec* high) {
  const __m512i pair = _mm512_maskz_loadu_epi16(lanes, p);
  *low = {widen(_mm512_castsi512_si256(pair))};
  *high = {widen(_mm512_extracti64x4_epi64(pair, 1))};
}
INTERNVIT_INLINE void store_pair(bf16* p, PairLanes lanes, Vec low, Vec high) {
  _mm512_mask_storeu_epi16(p, lanes, narrow_pair(low, high));
}
#else
template <class T>
INTERNVIT_INLINE void store_pair(T* p, Vec low, Vec high) {
  store(p, low);
  store(p + kLanes, high);
}

struct PairLanes {
  int64_t low, high;
};
INTERNVIT_INLINE PairLanes pair_lanes(int64_t n) { return {min_of(kLanes, n), n > kLanes ? n - kLanes : 0}; }
template <class T>
INTERNVIT_INLINE void load_pair(const T* p, PairLanes lanes, Vec* low, Vec* high) {
  *low = lanes.low == kLanes ? load(p) : load(p, lanes.low);
  *high = lanes.high == kLanes ? load(p + kLanes) : lanes.high ? load(p + kLanes, lanes.high) : broadcast(0.0f);
}
template <class T>
INTERNVIT_INLINE void store_pair(T* p, PairLanes lanes, Vec low, Vec high) {
  if (lanes.high == kLanes) return store_pair(p, low, high);
  store(p, low, lanes.low);
  if (lanes.high) store(p + kLanes, high, lanes.high);
}
#endif

}  // namespace internvit::INTERNVIT_ISA
