// Products of bytes by VPMADDWD, where there is no VNNI: both operands as int16, two products added up in int32. Exact,
// as VPDPBUSD's sums are. VPMADDUBSW multiplies twice as many bytes at a time, but its sums of two saturate in int16.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

// acc += A B, two depths of int16. Not by intrinsics: as GCC 12 orders them 6 rows take 1.6 times as long (Zen 3).
INTERNVIT_INLINE void madd(__m256i& acc, __m256i a, __m256i b) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "x"(b));
}

// Adds `pairs` of depth of 6 rows by 16 columns, in 12 registers: A is [pairs][6][2], B [pairs][32][2].
constexpr int64_t kMaddRows = 6, kMaddPair = kMaddRows * 2, kMaddColumns = 32;

INTERNVIT_INLINE void madd_pairs(__m256i (&acc)[kMaddRows][2], const int16_t* a, const int16_t* b, int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k, a += kMaddPair, b += kMaddColumns * 2) {
    __builtin_prefetch(a + 16 * kMaddPair);  // A comes from L2 or beyond
    const __m256i left = _mm256_load_si256((const __m256i*)b), right = _mm256_load_si256((const __m256i*)b + 1);
#pragma GCC unroll 6
    for (int i = 0; i < kMaddRows; ++i) {
      int32_t two;
      __builtin_memcpy(&two, a + i * 2, 4);
      const __m256i row = _mm256_set1_epi32(two);
      madd(acc[i][0], row, left);
      madd(acc[i][1], row, right);
    }
  }
}

// sums [6][32] = from + A B of 16 columns.
__attribute__((noinline)) void madd_block(const int16_t* a, const int16_t* b, int64_t pairs, const int32_t* from,
                                          int64_t from_row, int32_t* sums) {
  __m256i acc[kMaddRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMaddRows; ++i) {
    acc[i][0] = _mm256_load_si256((const __m256i*)(from + i * from_row));
    acc[i][1] = _mm256_load_si256((const __m256i*)(from + i * from_row + 8));
  }
  madd_pairs(acc, a, b, pairs);
#pragma GCC unroll 6
  for (int i = 0; i < kMaddRows; ++i) {
    _mm256_store_si256((__m256i*)(sums + i * kMaddColumns), acc[i][0]);
    _mm256_store_si256((__m256i*)(sums + i * kMaddColumns + 8), acc[i][1]);
  }
}

// sums [6][32] += ratio * (start + A B) of each group of up to `group` pairs, of 16 columns.
__attribute__((noinline)) void madd_grouped_block(const int16_t* a, const int16_t* b, int64_t pairs, int64_t group,
                                                  const int32_t* start, const float* ratio, bool first, float* sums) {
  for (int64_t from = 0; from < pairs; from += group, start += kMaddColumns, ratio += kMaddColumns) {
    const Ints begin = load_ints(start);
    __m256i acc[kMaddRows][2];
#pragma GCC unroll 6
    for (int i = 0; i < kMaddRows; ++i) {
      acc[i][0] = begin.a;
      acc[i][1] = begin.b;
    }
    madd_pairs(acc, a + from * kMaddPair, b + from * kMaddColumns * 2, min_of(group, pairs - from));
    const Vec factor = load(ratio);
#pragma GCC unroll 6
    for (int i = 0; i < kMaddRows; ++i) {
      float* total = sums + i * kMaddColumns;
      const Vec before = first && from == 0 ? broadcast(0.0f) : load(total);
      store(total, fma(to_floats({acc[i][0], acc[i][1]}), factor, before));
    }
  }
}

}  // namespace internvit::INTERNVIT_ISA
