// y = epilogue(x W^T + bias) for bf16; W is packed once, the epilogue runs before the only store.
//
// x is packed first, in a parallel pass of its own. Then a task has a range of panels (32 output features) and goes
// block by block: rows in blocks and depth in blocks of 1024, so that the x block stays in L2; within them depth in
// steps of 256, so that a panel's step (16 KiB) stays in L1 while the strips of rows pass by. The sums between steps
// lie in a task's scratch as float32. The order of additions over the depth depends on the depth alone.
//
// `Product` is the instruction set's share: kRows of a strip, kRowBlock strips of a block, Scope held by a task, the
// layout of packed x and the product of one strip with one panel's step, whose last step calls `finish_row`.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/gelu.h"
#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kPanel = 32, kDepthBlock = 1024, kDepthStep = 256;

inline void pack_weight_bf16(const PackWeightParams& p, const Executor& executor) {
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel, depth = (p.in_features + 31) / 32;
  parallel(executor, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = panel * kPanel + half * 16, rows = min_of(16, p.out_features - first);
          const bf16* w = p.weight + (rows > 0 ? first * p.in_features : 0) + d * 32;
          pack_columns(w, p.in_features, rows, p.in_features - d * 32,
                       p.packed + ((panel * depth + d) * 2 + half) * kTile);
        }
      }
    }
  });
}

// The epilogue of a panel's columns: bias, then GELU or the residual, one rounding.
struct Epilogue {
  const LinearParams& p;
  int64_t column, columns;
  __mmask32 mask;
  Vec bias[2] = {broadcast(0.0f), broadcast(0.0f)};

  Epilogue(const LinearParams& params, int64_t panel) : p(params), column(panel * kPanel) {
    columns = min_of(kPanel, p.out_features - column);
    mask = half_mask(columns);
    if (!p.bias) return;
    bias[0] = load(p.bias + column, min_of(16, columns));
    if (columns > 16) bias[1] = load(p.bias + column + 16, columns - 16);
  }

  // A row's columns are one or two lines, far from the next row's: asked for while the last step is computed.
  INTERNVIT_INLINE void prefetch_row(int64_t row) const {
    __builtin_prefetch(p.y + row * p.out_features + column, 1);
    if (p.residual) __builtin_prefetch(p.residual + row * p.residual_stride + column);
  }

  INTERNVIT_INLINE void finish_row(int64_t row, Vec left, Vec right) const {
    left = left + bias[0];
    right = right + bias[1];
    if (p.residual) {
      const __m512i residual = _mm512_maskz_loadu_epi16(mask, p.residual + row * p.residual_stride + column);
      left = left + Vec{widen(_mm512_castsi512_si256(residual))};
      right = right + Vec{widen(_mm512_extracti64x4_epi64(residual, 1))};
    }
    __m512i y = narrow_pair(left, right);
    if (p.gelu) {  // of the pre-activation as bf16 holds it
      const Vec z[2] = {{widen(_mm512_castsi512_si256(y))}, {widen(_mm512_extracti64x4_epi64(y, 1))}};
      y = narrow_pair(gelu_of<bf16>(z[0]), gelu_of<bf16>(z[1]));
    }
    _mm512_mask_storeu_epi16(p.y + row * p.out_features + column, mask, y);
  }
};

template <class Product>
void linear_bf16(const LinearParams& p, const Executor& executor) {
  const int64_t strips = (p.rows + Product::kRows - 1) / Product::kRows, depth = (p.in_features + 31) / 32;
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel;
  const int64_t row_blocks = (strips + Product::kRowBlock - 1) / Product::kRowBlock;
  const int64_t strip_sums = Product::kRows * kPanel;
  const int64_t packed_bytes = strips * Product::kRows * round_up(p.in_features, kDepthStep) * int64_t(sizeof(bf16));
  const Product product{p, static_cast<bf16*>(executor.shared(packed_bytes)), strips, depth};
  parallel(executor, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) product.pack_rows(strip);
  });
  // Panels change slowest over the units, so that two tasks share no weights, and rows split where there are many
  // tasks.
  parallel(executor, panels * row_blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first_panel = begin / row_blocks, last_panel = (end + row_blocks - 1) / row_blocks;
    const int64_t floats = (last_panel - first_panel) * Product::kRowBlock * strip_sums;
    float* all_sums = static_cast<float*>(executor.scratch(floats * int64_t(sizeof(float))));
    const typename Product::Scope scope;
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first_strip = strips * block / row_blocks, last_strip = strips * (block + 1) / row_blocks;
      for (int64_t outer = 0; outer < depth; outer += kDepthBlock / 32) {
        const int64_t outer_end = min_of(depth, outer + kDepthBlock / 32);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t unit = panel * row_blocks + block;
          if (unit < begin || unit >= end) continue;
          const Epilogue epilogue(p, panel);
          float* panel_sums = all_sums + (panel - first_panel) * Product::kRowBlock * strip_sums;
          for (int64_t d = outer; d < outer_end; d += kDepthStep / 32) {
            const int64_t step = min_of(kDepthStep / 32, outer_end - d);
            const bf16* b = p.packed_weight + (panel * depth + d) * 2 * kTile;
            for (int64_t strip = first_strip; strip < last_strip; ++strip) {
              float* sums = panel_sums + (strip - first_strip) * strip_sums;
              product.multiply(strip, strip + 1 < last_strip ? strip + 1 : strip, d, step, b, sums, epilogue);
            }
          }
        }
      }
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
