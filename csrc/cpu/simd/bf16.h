// Operands of bf16 products, for AMX tiles, VDPBF16PS and float32 FMA alike.
//
// A tile is 1 KiB and contiguous. A (left): 16 rows of 32 bf16. B (right): 16 pairs of depth x 16 columns, a pair's two
// values side by side, so that one vector is two depths of 16 columns.
#pragma once

#include "cpu/simd/pairs.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kTile = 512;  // bf16 elements of an operand tile; an accumulator has 256 floats

// Sixteen rows of up to 32 elements, `stride` apart, as a B tile whose columns are those rows; zero where there is
// none.
INTERNVIT_INLINE void pack_columns(const bf16* x, int64_t stride, int64_t rows, int64_t depth, bf16* tile) {
  __m512i r[16];
  const __mmask32 mask = half_mask(depth);
  for (int i = 0; i < 16; ++i)
    r[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * stride) : _mm512_setzero_si512();
  transpose_words(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, r[i]);
}

// Up to 32 rows of up to 16 elements as a B tile whose depth is those rows.
INTERNVIT_INLINE void pack_depth(const bf16* x, int64_t stride, int64_t rows, int64_t cols, bf16* tile) {
  const __mmask16 mask = __mmask16(half_mask(cols < 16 ? cols : 16));
  for (int64_t i = 0; i < 16; ++i) {
    __m256i even = _mm256_setzero_si256(), odd = even;
    if (2 * i < rows) even = _mm256_maskz_loadu_epi16(mask, x + 2 * i * stride);
    if (2 * i + 1 < rows) odd = _mm256_maskz_loadu_epi16(mask, x + (2 * i + 1) * stride);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    _mm512_store_si512(tile + i * 32, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
  }
}

// Two rows of 32 as 32 pairs: low holds columns 0 to 15, high the rest.
INTERNVIT_INLINE void interleave(__m512i even, __m512i odd, __m512i* low, __m512i* high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kLow);
  *low = _mm512_permutex2var_epi16(even, index, odd);
  *high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(index, _mm512_set1_epi16(16)), odd);
}

}  // namespace internvit::INTERNVIT_ISA
