// Products of unsigned and signed bytes by VPDPBUSD.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

// acc += A B, four depths of unsigned and signed bytes. Not by _mm512_dpbusd_epi32: where 24 accumulators of it are
// live GCC 12 may keep them all in memory, at half the speed.
INTERNVIT_INLINE void dpbusd(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// Adds `words` times four of depth of 12 rows by two vectors of 16 columns, in 24 registers, as Vdpbf16Block; A is
// [words][12][4]. Out of line: GCC kept constants of the epilogue in registers and accumulators in memory.
constexpr int64_t kVnniRows = 12, kVnniColumns = 32, kVnniWord = kVnniRows * 4;

__attribute__((noinline)) void vnni_block(const uint8_t* a, const int8_t* b, int64_t words, const int32_t* from,
                                          int64_t from_row, int32_t* sums) {
  __m512i acc[kVnniRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kVnniRows; ++i) {
    acc[i][0] = _mm512_load_si512(from + i * from_row);
    acc[i][1] = _mm512_load_si512(from + i * from_row + 16);
  }
  for (int64_t k = 0; k < words; ++k) {
    __builtin_prefetch(a + (k + 16) * kVnniWord);  // A comes from L2
    const __m512i left = _mm512_load_si512(b + k * 128), right = _mm512_load_si512(b + k * 128 + 64);
#pragma GCC unroll 12
    for (int i = 0; i < kVnniRows; ++i) {
      int32_t four;
      __builtin_memcpy(&four, a + k * kVnniWord + i * 4, 4);
      const __m512i row = _mm512_set1_epi32(four);
      dpbusd(acc[i][0], row, left);
      dpbusd(acc[i][1], row, right);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kVnniRows; ++i) {
    _mm512_store_si512(sums + i * kVnniColumns, acc[i][0]);
    _mm512_store_si512(sums + i * kVnniColumns + 16, acc[i][1]);
  }
}

// Adds ratio * (start + products) of each group of up to `group` words to float sums, six rows at a time: products and
// sums of more rows do not fit in the registers, and sums in L1 cost 8 % where these cost 2 (groups of 32 words). A is
// the first or the last six rows of [words][12][4].
__attribute__((noinline)) void vnni_grouped_block(const uint8_t* a, const int8_t* b, int64_t words, int64_t group,
                                                  const int32_t* start, const float* ratio, bool first, float* sums) {
  constexpr int kRows = kVnniRows / 2;
  __m512 total[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    total[i][0] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kVnniColumns);
    total[i][1] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kVnniColumns + 16);
  }
  for (int64_t from = 0; from < words; from += group) {
    __m512i acc[kRows][2];
    const __m512i start_left = _mm512_load_si512(start), start_right = _mm512_load_si512(start + 16);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] = start_left;
      acc[i][1] = start_right;
    }
    for (int64_t k = from; k < min_of(words, from + group); ++k) {
      const __m512i left = _mm512_load_si512(b + k * 128), right = _mm512_load_si512(b + k * 128 + 64);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, a + k * kVnniWord + i * 4, 4);
        const __m512i row = _mm512_set1_epi32(four);
        dpbusd(acc[i][0], row, left);
        dpbusd(acc[i][1], row, right);
      }
    }
    const __m512 left = _mm512_load_ps(ratio), right = _mm512_load_ps(ratio + 16);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      total[i][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][0]), left, total[i][0]);
      total[i][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][1]), right, total[i][1]);
    }
    start += kVnniColumns;
    ratio += kVnniColumns;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    _mm512_store_ps(sums + i * kVnniColumns, total[i][0]);
    _mm512_store_ps(sums + i * kVnniColumns + 16, total[i][1]);
  }
}

}  // namespace internvit::INTERNVIT_ISA
