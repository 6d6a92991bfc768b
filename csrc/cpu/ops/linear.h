// y = epilogue(x W^T + bias) for bf16, and for float32 without AVX-512; W is packed once, the epilogue runs before the
// only store. packed_gemm.h has the loops, linear_amx.h, linear_avx512bf16.h and linear_fma.h the products.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/gelu.h"
#include "cpu/ops/packed_gemm.h"
#if defined(__AVX512F__)
#include "cpu/simd/bf16.h"
#else
#include "cpu/simd/pairs.h"
#endif

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kDepthBlock = 1024;

#if defined(__AVX512F__)
inline void pack_weight(const PackWeightParams& p, const Executor& executor) {
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

#else
INTERNVIT_INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
INTERNVIT_INLINE __m256 eight(const bf16* p) { return widen(p); }
INTERNVIT_INLINE void store_eight(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
INTERNVIT_INLINE void store_eight(bf16* p, __m256 x) {  // of values that are bf16's
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
  const __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}

// Eight columns of a panel, of which `columns` are there, and eight of depth.
template <class T>
INTERNVIT_INLINE void pack_square(const T* w, int64_t stride, int64_t columns, int64_t depth, T* out) {
  if (columns >= 8 && depth >= 8) {
    __m256 r[8];
    for (int i = 0; i < 8; ++i) r[i] = eight(w + i * stride);
    transpose_words(r);
    for (int i = 0; i < 8; ++i) store_eight(out + i * kPanel, r[i]);
    return;
  }
  for (int64_t k = 0; k < 8; ++k)
    for (int64_t c = 0; c < 8; ++c) out[k * kPanel + c] = k < depth && c < columns ? w[c * stride + k] : T{};
}

// W as [panel][depth][32].
template <class T>
void pack_weight(const PackWeightParamsOf<T>& p, const Executor& executor) {
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel, depth = round_up(p.in_features, 32);
  parallel(executor, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kPanel; first < end * kPanel; first += 8) {
      T* out = p.packed + first / kPanel * depth * kPanel + first % kPanel;
      for (int64_t k = 0; k < depth; k += 8) {
        const int64_t columns = p.out_features - first, there = p.in_features - k;
        const T* w = p.weight + (columns > 0 && there > 0 ? first * p.in_features + k : 0);
        pack_square(w, p.in_features, columns, there, out + k * kPanel);
      }
    }
  });
}
#endif

// The epilogue of a panel's columns: bias, then GELU or the residual, one rounding.
template <class T>
struct EpilogueOf {
  const LinearParamsOf<T>& p;
  int64_t column, columns;
  PairLanes lanes;
  Vec bias[2] = {broadcast(0.0f), broadcast(0.0f)};

  EpilogueOf(const LinearParamsOf<T>& params, int64_t panel) : p(params), column(panel * kPanel) {
    columns = min_of(kPanel, p.out_features - column);
    lanes = pair_lanes(columns);
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
      Vec residual[2];
      load_pair(p.residual + row * p.residual_stride + column, lanes, &residual[0], &residual[1]);
      left = left + residual[0];
      right = right + residual[1];
    }
    if (p.gelu) {  // of the pre-activation as summed
      left = gelu_of<T>(left);
      right = gelu_of<T>(right);
    }
    store_pair(p.y + row * p.out_features + column, lanes, left, right);
  }
};
using Epilogue = EpilogueOf<bf16>;

// What the products have: x packed as each of them likes, in X, and the extents.
template <class T, class X, int64_t kDepth>
struct Operands {
  using Sum = float;
  static constexpr int64_t kDepthStep = kDepth, kStep = kDepth / 32;

  const LinearParamsOf<T>& p;
  X* packed_x;
  int64_t strips, panels, depth;  // tiles of 32

  Operands(const LinearParamsOf<T>& params, int64_t rows_of_strip, const Executor& executor)
      : p(params),
        strips((p.rows + rows_of_strip - 1) / rows_of_strip),
        panels((p.out_features + kPanel - 1) / kPanel),
        depth((p.in_features + 31) / 32) {
    const int64_t elements = strips * rows_of_strip * round_up(p.in_features, kDepthStep);
    packed_x = static_cast<X*>(executor.shared(elements * int64_t(sizeof(X))));
  }

  int64_t depth_block() const { return kDepthBlock / 32; }
  EpilogueOf<T> epilogue(int64_t panel) const { return {p, panel}; }
  void start_step(int64_t, int64_t, int64_t, const EpilogueOf<T>&) const {}
  const T* weight(int64_t panel, int64_t d) const { return p.packed_weight + (panel * depth + d) * 32 * kPanel; }
};
template <class X, int64_t kDepth>
using Bf16Operands = Operands<bf16, X, kDepth>;

template <class Product, class T>
void linear(const LinearParamsOf<T>& p, const Executor& executor) {
  packed_gemm(Product{{p, Product::kRows, executor}}, executor);
}

}  // namespace internvit::INTERNVIT_ISA
