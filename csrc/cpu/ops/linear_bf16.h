// y = epilogue(x W^T + bias) for bf16; W is packed once, the epilogue runs before the only store. packed_gemm.h has the
// loops, linear_amx.h, linear_avx512bf16.h and linear_fma.h the products.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/gelu.h"
#include "cpu/ops/packed_gemm.h"
#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kDepthBlock = 1024;

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
    if (p.gelu) {  // of the pre-activation as summed
      left = gelu_of<bf16>(left);
      right = gelu_of<bf16>(right);
    }
    const __m512i y = narrow_pair(left, right);
    _mm512_mask_storeu_epi16(p.y + row * p.out_features + column, mask, y);
  }
};

// What the products have: x packed as each of them likes, in X, and the extents.
template <class X, int64_t kDepth>
struct Bf16Operands {
  using Sum = float;
  static constexpr int64_t kDepthStep = kDepth, kStep = kDepth / 32;

  const LinearParams& p;
  X* packed_x;
  int64_t strips, panels, depth;  // tiles of 32

  Bf16Operands(const LinearParams& params, int64_t rows_of_strip, const Executor& executor)
      : p(params),
        strips((p.rows + rows_of_strip - 1) / rows_of_strip),
        panels((p.out_features + kPanel - 1) / kPanel),
        depth((p.in_features + 31) / 32) {
    const int64_t elements = strips * rows_of_strip * round_up(p.in_features, kDepthStep);
    packed_x = static_cast<X*>(executor.shared(elements * int64_t(sizeof(X))));
  }

  int64_t depth_block() const { return kDepthBlock / 32; }
  Epilogue epilogue(int64_t panel) const { return {p, panel}; }
  void start_step(int64_t, int64_t, int64_t, const Epilogue&) const {}
  const bf16* weight(int64_t panel, int64_t d) const { return p.packed_weight + (panel * depth + d) * 2 * kTile; }
};

template <class Product>
void linear_bf16(const LinearParams& p, const Executor& executor) {
  packed_gemm(Product{{p, Product::kRows, executor}}, executor);
}

}  // namespace internvit::INTERNVIT_ISA
