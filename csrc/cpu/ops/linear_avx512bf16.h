// The product of a strip of 12 rows with a panel by VDPBF16PS: linear_bf16.h.
#pragma once

#include "cpu/ops/linear_bf16.h"
#include "cpu/simd/vdpbf16.h"

namespace internvit::INTERNVIT_ISA {

struct Vdpbf16Product : Bf16Operands {
  static constexpr int64_t kRows = kVdpbf16Rows;
  struct Scope {};

  int64_t row_block() const { return 29; }  // 0.7 MB of x

  // packed_x is [K / 256][strip][12][256]: the strips of a step follow one another in memory as they do in time.
  bf16* step_of(int64_t strip, int64_t d) const {
    return packed_x + (d / (kDepthStep / 32) * strips + strip) * kRows * kDepthStep;
  }

  void pack_rows(int64_t strip) const {
    for (int64_t k = 0; k < p.in_features; k += kDepthStep) {
      bf16* out = step_of(strip, k / 32);
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = strip * kRows + i;
        for (int64_t c = 0; c < kDepthStep; c += 32) {
          const __mmask32 mask = row < p.rows ? half_mask(p.in_features - k - c) : __mmask32(0);
          const bf16* x = p.x + (mask ? row * p.x_stride + k + c : 0);
          _mm512_store_si512(out + i * kDepthStep + c, _mm512_maskz_loadu_epi16(mask, x));
        }
      }
    }
  }

  // Over `step` tiles of 32 from depth d on; `sums` [12][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t panel, int64_t strip, int64_t, int64_t d, int64_t step, float* sums,
                                 const Epilogue& epilogue) const {
    const bf16* b = weight(panel, d);
    const bf16* a = step_of(strip, d);
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    const bool last = d + step == depth;
    for (int64_t i = 0; last && i < rows; ++i) epilogue.prefetch_row(strip * kRows + i);
    Vdpbf16Block block;
    if (d == 0) {
      block.zero();
    } else {
      block.load_from(sums, kPanel);
    }
    for (int64_t t = 0; t < step; ++t)
      block.add<kDepthStep, 2, 32>(a + t * 32, b + t * 2 * kTile, b + (t * 2 + 1) * kTile, 16);
    if (!last) return block.store_to(sums, kPanel);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      if (i < rows) epilogue.finish_row(strip * kRows + i, {block.acc[i][0]}, {block.acc[i][1]});
  }
};

}  // namespace internvit::INTERNVIT_ISA
