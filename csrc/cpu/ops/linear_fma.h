// The product of a strip of rows with a panel by float32 FMA, for AVX-512 without bf16 products (Skylake to Ice Lake)
// and for AVX2: linear.h. Every product of two bf16 is exact in float32.
//
// x is packed as float32. A bf16 W stays bf16 in memory; a panel's step of it is widened once for all strips of a
// block: widened in the loop, by instructions that compete with FMA for its two ports, it took 12 % longer (AVX-512). A
// float32 W is read as it was packed.
#pragma once

#include "cpu/ops/linear.h"
#if defined(__AVX512F__)
#include "cpu/simd/register_block.h"
#endif

namespace internvit::INTERNVIT_ISA {

#if defined(__AVX512F__)

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

INTERNVIT_INLINE void multiply_strip(const float* a, const float* b, int64_t depth, bool first, float* sums) {
  FmaBlock block;
  if (first) {
    block.zero();
  } else {
    block.load_from(sums, kPanel);
  }
  block.add(a, b, depth);
  block.store_to(sums, kPanel);
}

// 16 of depth of `rows` rows, of which `there` are there.
INTERNVIT_INLINE void pack_strip(const bf16* x, int64_t stride, int64_t rows, int64_t there, float* out) {
  __m512i r[16];
  for (int64_t i = 0; i < 16; ++i) {
    const bool has = i < rows && there > 0;
    const bf16* row = x + (has ? i * stride : 0);
    r[i] = _mm512_castps_si512((!has ? broadcast(0.0f) : there >= 16 ? load(row) : load(row, there)).v);
  }
  transpose_words(r);
  for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + i * kFmaRows, lane_mask(kFmaRows), r[i]);
}

// `step` times 32 of depth of a panel, packed by pack_weight, as [depth][32].
INTERNVIT_INLINE void widen_panel(const bf16* tile, int64_t step, float* weight) {
  const __m512i odd = _mm512_set1_epi32(int(0xffff0000));
  for (int64_t t = 0; t < step * 2; ++t, tile += kTile) {  // 32 of depth of 16 columns
    float* out = weight + t / 2 * 32 * kPanel + t % 2 * 16;
    for (int64_t k = 0; k < 16; ++k, out += 2 * kPanel) {
      const __m512i pair = _mm512_load_si512(tile + k * 32);
      _mm512_store_si512(out, _mm512_slli_epi32(pair, 16));
      _mm512_store_si512(out + kPanel, _mm512_and_si512(pair, odd));
    }
  }
}

#else

constexpr int kFmaRows = 6;

// Of 16 columns. A step has sums of its own, which are added to those before: a fifth of the error of one chain, 1.7e-7
// for 4096 products.
INTERNVIT_INLINE void multiply_half(const float* a, const float* b, int64_t depth, bool first, float* sums) {
  constexpr int64_t kAhead = 16 * kFmaRows;  // of A, a stream from L2 or beyond
  Vec acc[kFmaRows];
  for (int i = 0; i < kFmaRows; ++i) acc[i] = broadcast(0.0f);
  for (int64_t k = 0; k < depth; ++k, a += kFmaRows, b += kPanel) {
    __builtin_prefetch(a + kAhead);
    const Vec row = load(b);
    for (int i = 0; i < kFmaRows; ++i) acc[i] = fma(broadcast(a[i]), row, acc[i]);
  }
  for (int i = 0; i < kFmaRows; ++i, sums += kPanel) store(sums, first ? acc[i] : load(sums) + acc[i]);
}

INTERNVIT_INLINE void multiply_strip(const float* a, const float* b, int64_t depth, bool first, float* sums) {
  for (int64_t half = 0; half < kPanel; half += kLanes) multiply_half(a, b + half, depth, first, sums + half);
}

template <class T>
INTERNVIT_INLINE void pack_strip(const T* x, int64_t stride, int64_t rows, int64_t there, float* out) {
  __m256 left[kFmaRows], right[kFmaRows];
  for (int64_t i = 0; i < kFmaRows; ++i) {
    const bool has = i < rows && there > 0;
    const T* row = x + (has ? i * stride : 0);
    const Vec values = !has ? broadcast(0.0f) : there >= kLanes ? load(row) : load(row, there);
    left[i] = values.a;
    right[i] = values.b;
  }
  store_columns(left, out);
  store_columns(right, out + 8 * kFmaRows);
}

INTERNVIT_INLINE void widen_panel(const bf16* packed, int64_t step, float* weight) {
  for (int64_t i = 0; i < step * 32 * kPanel; i += kLanes) store(weight + i, load(packed + i));
}

#endif

// 128 of depth of a panel, 16 KiB of float32, stay in L1 while the strips pass by.
template <class T>
struct FmaProduct : Operands<T, float, 128> {
  using Base = Operands<T, float, 128>;
  using Base::p, Base::packed_x, Base::strips, Base::depth, Base::kDepthStep, Base::kStep;

  static constexpr int64_t kRows = kFmaRows;
  static constexpr bool kWidens = __is_same(T, bf16);
  struct Scope {};
  struct Panel : EpilogueOf<T> {
    using EpilogueOf<T>::EpilogueOf;                              // which leaves the step to start_step
    alignas(64) float weight[kWidens ? kDepthStep * kPanel : 1];  // [depth][32]
  };

  // Widening pays when many strips pass by, and units are enough for many threads (12 strips of 12 rows: 6 % slower,
  // 36: 1 % faster). A float32 W comes from memory for each block: of 288 rows 1 to 9 % slower (Zen 3).
  int64_t row_block() const { return (kWidens ? 288 : 576) / kRows; }
  Panel epilogue(int64_t panel) const { return Panel(p, panel); }

  // packed_x is [step of depth][strip][128][kRows].
  float* step_of(int64_t strip, int64_t d) const {
    return packed_x + (d / kStep * strips + strip) * kRows * kDepthStep;
  }

  void pack_rows(int64_t strip) const {
    const T* x = p.x + strip * kRows * p.x_stride;
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    for (int64_t from = 0; from < depth * 32; from += 16) {
      const int64_t there = p.in_features - from;
      float* out = step_of(strip, from / 32) + from % kDepthStep * kRows;
      pack_strip(x + (there > 0 ? from : 0), p.x_stride, rows, there, out);
    }
  }

  INTERNVIT_INLINE void start_step(int64_t index, int64_t d, int64_t step, Panel& panel) const {
    if constexpr (kWidens) widen_panel(this->weight(index, d), step, panel.weight);
  }
  INTERNVIT_INLINE const float* weight_of(int64_t index, int64_t d, const Panel& panel) const {
    if constexpr (kWidens) {
      return panel.weight;
    } else {
      return this->weight(index, d);
    }
  }

  // Over `step` tiles of 32 from depth d on; `sums` [kRows][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t index, int64_t strip, int64_t, int64_t d, int64_t step, float* sums,
                                 const Panel& panel) const {
    const int64_t rows = min_of(kRows, p.rows - strip * kRows);
    const bool last = d + step == depth;
    for (int64_t i = 0; last && i < rows; ++i) panel.prefetch_row(strip * kRows + i);
    multiply_strip(step_of(strip, d), weight_of(index, d, panel), step * 32, d == 0, sums);
    for (int64_t i = 0; last && i < rows; ++i)
      panel.finish_row(strip * kRows + i, load(sums + i * kPanel), load(sums + i * kPanel + 16));
  }
};

}  // namespace internvit::INTERNVIT_ISA
