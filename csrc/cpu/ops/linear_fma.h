// The product of a strip of 12 rows with a panel by float32 FMA, for AVX-512 without bf16 products (Skylake to Ice
// Lake): linear_bf16.h. Every product of two bf16 is exact in float32.
//
// x is packed as float32. W stays bf16 in memory; a panel's step of it is widened once for all strips of a block:
// widened in the loop, by instructions that compete with FMA for its two ports, it took 12 % longer.
#pragma once

#include "cpu/ops/linear_bf16.h"
#include "cpu/simd/register_block.h"

namespace internvit::INTERNVIT_ISA {

constexpr int kFmaRows = 12;

// Adds `depth` of products: A is [depth][12], B [depth][32].
struct FmaBlock : RegisterBlock<kFmaRows, 2> {
  INTERNVIT_INLINE void add(const float* a, const float* b, int64_t depth) {
    constexpr int64_t kAhead = 16 * kFmaRows;  // of A, a stream from L2 or beyond
    for (int64_t k = 0; k < depth; ++k, a += kFmaRows, b += kPanel) {
      __builtin_prefetch(a + kAhead);
      const __m512 left = _mm512_load_ps(b), right = _mm512_load_ps(b + 16);
#pragma GCC unroll 12
      for (int i = 0; i < kFmaRows; ++i) {
        const __m512 row = _mm512_set1_ps(a[i]);
        acc[i][0] = _mm512_fmadd_ps(row, left, acc[i][0]);
        acc[i][1] = _mm512_fmadd_ps(row, right, acc[i][1]);
      }
    }
  }
};

// 128 of depth of a panel, 16 KiB of float32, stay in L1 while the strips pass by.
struct FmaProduct : Bf16Operands<float, 128> {
  static constexpr int64_t kRows = kFmaRows;
  struct Scope {};
  struct Panel : Epilogue {
    using Epilogue::Epilogue;  // which leaves the step to start_step
    alignas(64) float weight[kDepthStep * kPanel];  // [depth][32]
  };

  // Widening pays when many strips pass by, and units are enough for many threads (12 strips: 6 % slower, 36: 1 %
  // faster).
  int64_t row_block() const { return 24; }
  Panel epilogue(int64_t panel) const { return Panel(p, panel); }

  // packed_x is [step of depth][strip][128][12].
  float* step_of(int64_t strip, int64_t d) const {
    return packed_x + (d / kStep * strips + strip) * kRows * kDepthStep;
  }

  void pack_rows(int64_t strip) const {
    for (int64_t from = 0; from < depth * 32; from += 16) {
      __m512i r[16];
      const int64_t there = p.in_features - from;
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = strip * kRows + i;
        const bool has = i < kRows && row < p.rows && there > 0;
        const bf16* x = p.x + (has ? row * p.x_stride + from : 0);
        r[i] = _mm512_castps_si512((!has ? broadcast(0.0f) : there >= 16 ? load(x) : load(x, there)).v);
      }
      transpose_words(r);
      float* out = step_of(strip, from / 32) + from % kDepthStep * kRows;
      for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + i * kRows, lane_mask(kRows), r[i]);
    }
  }

  INTERNVIT_INLINE void start_step(int64_t index, int64_t d, int64_t step, Panel& panel) const {
    const bf16* tile = weight(index, d);
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t t = 0; t < step * 2; ++t, tile += kTile) {  // 32 of depth of 16 columns
      float* out = panel.weight + t / 2 * 32 * kPanel + t % 2 * 16;
      for (int64_t k = 0; k < 16; ++k, out += 2 * kPanel) {
        const __m512i pair = _mm512_load_si512(tile + k * 32);
        _mm512_store_si512(out, _mm512_slli_epi32(pair, 16));
        _mm512_store_si512(out + kPanel, _mm512_and_si512(pair, odd));
      }
    }
  }

  // Over `step` tiles of 32 from depth d on; `sums` [12][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t, int64_t strip, int64_t, int64_t d, int64_t step, float* sums,
                                 const Panel& panel) const {
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    const bool last = d + step == depth;
    for (int64_t i = 0; last && i < rows; ++i) panel.prefetch_row(strip * kRows + i);
    FmaBlock block;
    if (d == 0) {
      block.zero();
    } else {
      block.load_from(sums, kPanel);
    }
    block.add(step_of(strip, d), panel.weight, step * 32);
    block.store_to(sums, kPanel);
    for (int64_t i = 0; last && i < rows; ++i)
      panel.finish_row(strip * kRows + i, load(sums + i * kPanel), load(sums + i * kPanel + 16));
  }
};

}  // namespace internvit::INTERNVIT_ISA
