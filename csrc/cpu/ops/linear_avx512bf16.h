// The product of a strip of 12 rows with a panel by VDPBF16PS: linear.h.
#pragma once

#include "cpu/ops/linear.h"
#include "cpu/simd/vdpbf16.h"

namespace internvit::INTERNVIT_ISA {

// A strip goes through the whole depth of a block at once: between steps of 256 its sums would be stored and loaded,
// and each store of 64 bytes takes Zen 4 1.5 cycles in which no product starts. Neither operand stays in L1 then. x is
// asked for a few tiles ahead, the next panel's weights, the sums and the rows of the epilogue a line at a time: 6 % on
// the four shapes of the 300M, one core of a busy Zen 4.
struct Vdpbf16Product : Bf16Operands<bf16, kDepthBlock> {
  static constexpr int64_t kRows = kVdpbf16Rows, kAhead = 4;  // tiles
  struct Scope {};

  int64_t row_block() const { return 29; }  // 0.7 MB of x

  // Depth in blocks of equal size: 3200 is four times 800.
  int64_t depth_block() const {
    const int64_t blocks = (depth + kStep - 1) / kStep;
    return (depth + blocks - 1) / blocks;
  }

  // packed_x is [block of depth][strip][12][1024]: the strips of a step follow one another in memory as they do in
  // time. Rows of 1024 without gaps are packed as they come: proj of the 300M is 2 % faster.
  bool packed_already(int64_t strip) const {
    return p.in_features == kDepthStep && p.x_stride == kDepthStep && (strip + 1) * kRows <= p.rows;
  }
  const bf16* step_of(int64_t strip, int64_t d) const {
    if (packed_already(strip)) return p.x + strip * kRows * kDepthStep;
    return packed_x + (d / depth_block() * strips + strip) * kRows * kDepthStep;
  }

  void pack_rows(int64_t strip) const {
    if (packed_already(strip)) return;
    const int64_t block = depth_block();
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = strip * kRows + i;
      for (int64_t from = 0; from < depth; from += block) {
        bf16* out = const_cast<bf16*>(step_of(strip, from)) + i * kDepthStep;
        for (int64_t d = from; d < min_of(depth, from + block); ++d, out += 32) {
          const __mmask32 mask = row < p.rows ? half_mask(p.in_features - d * 32) : __mmask32(0);
          const bf16* x = p.x + (mask ? row * p.x_stride + d * 32 : 0);
          _mm512_store_si512(out, _mm512_maskz_loadu_epi16(mask, x));
        }
      }
    }
  }

  // Over `step` tiles of 32 from depth d on; `sums` [12][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t panel, int64_t strip, int64_t next_strip, int64_t d, int64_t step, float* sums,
                                 const Epilogue& epilogue) const {
    const bf16 *a = step_of(strip, d), *next_a = step_of(next_strip, d), *b = weight(panel, d);
    const bf16* next_b = weight(min_of(panel + 1, panels - 1), d) + strip % 32 * step * 32;
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    const bool last = d + step == depth;
    const auto prefetch = [](const void* line) __attribute__((always_inline)) { _mm_prefetch(line, _MM_HINT_T0); };
    Vdpbf16Block block;
    if (d == 0) {
      block.zero();
    } else {
      block.load_from(sums, kPanel);
    }
    for (int64_t t = 0; t < step; ++t) {
      const bf16* ahead = t + kAhead < step ? a + (t + kAhead) * 32 : next_a + (t + kAhead - step) * 32;
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) prefetch(ahead + i * kDepthStep);
      _mm_prefetch(next_b + t * 32, _MM_HINT_T1);
      if (d && t < 2 * kRows) prefetch(sums + kRows * kPanel + t * 16);
      if (last && t < rows) epilogue.prefetch_row(strip * kRows + t);
      block.add<kDepthStep, 2, 32>(a + t * 32, b + t * 2 * kTile, b + (t * 2 + 1) * kTile, 16);
    }
    if (!last) return block.store_to(sums, kPanel);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      if (i < rows) epilogue.finish_row(strip * kRows + i, {block.acc[i][0]}, {block.acc[i][1]});
  }
};

}  // namespace internvit::INTERNVIT_ISA
