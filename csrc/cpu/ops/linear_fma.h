// The product of a strip of 12 rows with a panel by float32 FMA, for AVX-512 without bf16 products (Skylake to Ice
// Lake): linear_bf16.h. Every product of two bf16 is exact in float32.
//
// x is packed as float32, and read as a broadcast; W stays bf16 in pairs of depths, whose two float32 are a shift and
// an AND away: 4 instructions for 48 FMAs. oneDNN's bf16 Linear reaches a quarter of this on Cascade Lake.
#pragma once

#include "cpu/ops/linear_bf16.h"
#include "cpu/simd/register_block.h"

namespace internvit::INTERNVIT_ISA {

constexpr int kFmaRows = 12;

// Adds `pairs` pairs of depth: row i of A is at a + i * kRow; b0 and b1 hold a pair's vectors, [16 columns][2].
struct FmaBlock : RegisterBlock<kFmaRows, 2> {
  template <int64_t kRow>
  INTERNVIT_INLINE void add(const float* a, const bf16* b0, const bf16* b1, int64_t pairs) {
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512i left = _mm512_load_si512(b0 + k * 32), right = _mm512_load_si512(b1 + k * 32);
      const __m512 columns[2][2] = {
          {_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(right, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(left, odd)), _mm512_castsi512_ps(_mm512_and_si512(right, odd))}};
      for (int d = 0; d < 2; ++d) {
#pragma GCC unroll 12
        for (int i = 0; i < kFmaRows; ++i) {
          const __m512 row = _mm512_set1_ps(a[i * kRow + 2 * k + d]);
          acc[i][0] = _mm512_fmadd_ps(row, columns[d][0], acc[i][0]);
          acc[i][1] = _mm512_fmadd_ps(row, columns[d][1], acc[i][1]);
        }
      }
    }
  }
};

// 256 of depth of a panel (16 KiB) stay in L1 while the strips pass by.
struct FmaProduct : Bf16Operands<float, 256> {
  static constexpr int64_t kRows = kFmaRows;
  struct Scope {};

  int64_t row_block() const { return 12; }  // 0.6 MB of x

  // packed_x is [step of depth][strip][12][256].
  float* step_of(int64_t strip, int64_t d) const {
    return packed_x + (d / kStep * strips + strip) * kRows * kDepthStep;
  }

  void pack_rows(int64_t strip) const {
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = strip * kRows + i;
      for (int64_t d = 0; d < depth; ++d) {
        float* out = step_of(strip, d) + i * kDepthStep + d % kStep * 32;
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t from = d * 32 + half * 16, there = row < p.rows ? p.in_features - from : 0;
          const bf16* x = there > 0 ? p.x + row * p.x_stride + from : nullptr;
          store(out + half * 16, there >= 16 ? load(x) : there > 0 ? load(x, there) : broadcast(0.0f));
        }
      }
    }
  }

  // Over `step` tiles of 32 from depth d on; `sums` [12][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t panel, int64_t strip, int64_t, int64_t d, int64_t step, float* sums,
                                 const Epilogue& epilogue) const {
    const float* a = step_of(strip, d);
    const bf16* b = weight(panel, d);
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    const bool last = d + step == depth;
    for (int64_t i = 0; last && i < rows; ++i) epilogue.prefetch_row(strip * kRows + i);
    FmaBlock block;
    if (d == 0) {
      block.zero();
    } else {
      block.load_from(sums, kPanel);
    }
    for (int64_t t = 0; t < step; ++t)
      block.add<kDepthStep>(a + t * 32, b + t * 2 * kTile, b + (t * 2 + 1) * kTile, 16);
    block.store_to(sums, kPanel);
    for (int64_t i = 0; last && i < rows; ++i)
      epilogue.finish_row(strip * kRows + i, load(sums + i * kPanel), load(sums + i * kPanel + 16));
  }
};

}  // namespace internvit::INTERNVIT_ISA
