// Products of bf16 by VDPBF16PS: acc[i][j] += A[i] B[j], 12 rows times two vectors of 16 columns, in 24 registers.
//
// Each step of a pair of depths loads two vectors of B and broadcasts twelve pairs of A: 24 products, 12 cycles where
// two start in a cycle (Zen 5), for 14 loads. The strides of A are known to the compiler, so that every address is one
// base and a constant. A pair's two depths are neighbours in memory, be it along a row (kARow = the row's length, kPair
// = 2) or with the rows of a pair side by side (kARow = 2).
#pragma once

#include "cpu/simd/register_block.h"
#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kVdpbf16Rows = 12;

template <int kRows, int kVectors = 2>
struct Vdpbf16BlockOf : RegisterBlock<kRows, kVectors> {
  using RegisterBlock<kRows, kVectors>::acc;

  // Adds `pairs` pairs of depth: row i of A has pair k at a + i * kARow + k * kPair; b0 and b1 hold pair k's vectors,
  // [16 columns][2], at k * kColumns.
  template <int64_t kARow, int64_t kPair, int64_t kColumns>
  INTERNVIT_INLINE void add(const bf16* a, const bf16* b0, const bf16* b1, int64_t pairs) {
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512bh left_column = (__m512bh)_mm512_load_si512(b0 + k * kColumns);
      const __m512bh right_column = kVectors == 1 ? left_column : (__m512bh)_mm512_load_si512(b1 + k * kColumns);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a + i * kARow + k * kPair, 4);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], row, left_column);
        if constexpr (kVectors == 2) acc[i][1] = _mm512_dpbf16_ps(acc[i][1], row, right_column);
      }
    }
  }
};
using Vdpbf16Block = Vdpbf16BlockOf<kVdpbf16Rows>;

// Rows of up to 32 columns, `stride` apart, as vectors whose depth is those rows: [pairs][2][16 columns][2].
INTERNVIT_INLINE void pack_pairs(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t pairs,
                                 bf16* out) {
  const __mmask32 mask = half_mask(columns);
  for (int64_t k = 0; k < pairs; ++k) {
    const __mmask32 even_mask = 2 * k < rows ? mask : 0, odd_mask = 2 * k + 1 < rows ? mask : 0;
    __m512i low, high;
    interleave(_mm512_maskz_loadu_epi16(even_mask, x + (even_mask ? 2 * k * stride : 0)),
               _mm512_maskz_loadu_epi16(odd_mask, x + (odd_mask ? (2 * k + 1) * stride : 0)), &low, &high);
    _mm512_store_si512(out + k * 64, low);
    _mm512_store_si512(out + k * 64 + 32, high);
  }
}

}  // namespace internvit::INTERNVIT_ISA
