// y = epilogue(x_scale * weight_scale * ((x_q - x_zero) W_q^T) + bias) for int8, by VPDPBUSD; W_q is packed once.
//
// Laid out as linear_bf16.h, with four depths of a byte where it has two of a bf16. VPDPBUSD multiplies unsigned bytes
// by signed ones: x_q + 128 is packed, and sums begin at -128 times the sum of a column's weights, which is packed
// behind the weights. Sums are exact (int32, up to a depth of 2^31 / (255 * 128) = 65,793), so that their order does
// not matter. The epilogue runs before the only store. x may come unquantised: the pass that packs it finds each row's
// scale and zero point, so that x_q has no memory of its own.
#pragma once

#include "cpu/ops/gelu.h"
#include "cpu/ops/quantize_rows.h"
#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kInt8Rows = 12, kInt8Panel = 32, kInt8Tile = 1024;  // a tile: 16 words of 4 depths, 16 columns
constexpr int64_t kInt8DepthStep = 512, kInt8DepthBlock = 2048;       // bytes
constexpr int64_t kInt8RowBlock = 29;                                 // strips: 0.7 MB of x

INTERNVIT_INLINE __mmask64 byte_mask(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : n <= 0 ? __mmask64(0) : (__mmask64(1) << n) - 1;
}

// -128 times the sum of each column's weights, [panels * 32], behind the tiles.
INTERNVIT_INLINE int32_t* first_sums(int8_t* packed, int64_t panels, int64_t depth) {
  return reinterpret_cast<int32_t*>(packed + panels * depth * 2 * kInt8Tile);
}

inline void pack_weight_int8(const PackWeightInt8Params& p, const Executor& executor) {
  const int64_t panels = (p.out_features + kInt8Panel - 1) / kInt8Panel, depth = (p.in_features + 63) / 64;
  int32_t* sums = first_sums(p.packed, panels, depth);
  parallel(executor, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin * 2; group < end * 2; ++group) {  // of 16 columns
      __m512i sum = _mm512_setzero_si512();
      for (int64_t d = 0; d < depth; ++d) {
        __m512i r[16];
        const __mmask64 mask = byte_mask(p.in_features - d * 64);
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t row = group * 16 + i;
          r[i] = row < p.out_features ? _mm512_maskz_loadu_epi8(mask, p.weight_q + row * p.in_features + d * 64)
                                      : _mm512_setzero_si512();
        }
        transpose_words(r);
        int8_t* tile = p.packed + ((group / 2 * depth + d) * 2 + group % 2) * kInt8Tile;
        for (int64_t i = 0; i < 16; ++i) {
          _mm512_store_si512(tile + i * 64, r[i]);
          sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), r[i]);
        }
      }
      _mm512_store_si512(sums + group * 16, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
    }
  });
}

// The epilogue of a panel's columns: zero point, scales and bias, then GELU, one rounding.
template <class T>
struct Int8Epilogue {
  const LinearInt8Params& p;
  int64_t column, left_columns, right_columns;
  Vec scale[2], bias[2] = {broadcast(0.0f), broadcast(0.0f)};
  __m512i weight_sum[2];

  Int8Epilogue(const LinearInt8Params& params, int64_t panel, const int32_t* starts)
      : p(params), column(panel * kInt8Panel) {
    for (int half = 0; half < 2; ++half)  // starts are -128 times the sums
      weight_sum[half] = _mm512_srai_epi32(_mm512_load_si512(starts + half * 16), 7);
    const int64_t columns = min_of(kInt8Panel, p.out_features - column);
    left_columns = min_of(16, columns);
    right_columns = columns - left_columns;
    load_pair(p.weight_scale, scale);
    if (p.bias) load_pair(p.bias, bias);
  }

  INTERNVIT_INLINE void load_pair(const float* values, Vec (&pair)[2]) const {
    pair[0] = load(values + column, left_columns);
    pair[1] = right_columns > 0 ? load(values + column + 16, right_columns) : broadcast(0.0f);
  }

  INTERNVIT_INLINE T* row_of(int64_t row) const { return static_cast<T*>(p.y) + row * p.out_features + column; }

  INTERNVIT_INLINE Vec value(__m512i sum, Vec row_scale, __m512i zero, int half) const {
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(zero, weight_sum[half]));  // of the negated sums
    const Vec y = fma(Vec{_mm512_cvtepi32_ps(sum)} * row_scale, scale[half], bias[half]);
    return p.gelu ? gelu_of<T>(y) : y;
  }

  INTERNVIT_INLINE void finish_row(int64_t row, __m512i left, __m512i right) const {
    const Vec row_scale = broadcast(p.x_scale[row]);
    const __m512i zero = _mm512_set1_epi32(p.x_zero ? p.x_zero[row] : 0);
    T* y = row_of(row);
    store(y, value(left, row_scale, zero, 0), left_columns);
    if (right_columns > 0) store(y + 16, value(right, row_scale, zero, 1), right_columns);
  }
};

// acc[i][j] += A[i] B[j]: 12 rows by two vectors of 16 columns, in 24 registers, as Vdpbf16Block.
struct VnniBlock {
  __m512i acc[kInt8Rows][2];

  INTERNVIT_INLINE void start(const int32_t* sums) {
    const __m512i left = _mm512_load_si512(sums), right = _mm512_load_si512(sums + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kInt8Rows; ++i) {
      acc[i][0] = left;
      acc[i][1] = right;
    }
  }
  INTERNVIT_INLINE void load_from(const int32_t* c) {
#pragma GCC unroll 12
    for (int i = 0; i < kInt8Rows; ++i) {
      acc[i][0] = _mm512_load_si512(c + i * kInt8Panel);
      acc[i][1] = _mm512_load_si512(c + i * kInt8Panel + 16);
    }
  }
  INTERNVIT_INLINE void store_to(int32_t* c) const {
#pragma GCC unroll 12
    for (int i = 0; i < kInt8Rows; ++i) {
      _mm512_store_si512(c + i * kInt8Panel, acc[i][0]);
      _mm512_store_si512(c + i * kInt8Panel + 16, acc[i][1]);
    }
  }
  // Adds 64 of depth; row i of A is at a + i * kInt8DepthStep.
  INTERNVIT_INLINE void add(const uint8_t* a, const int8_t* b) {
    for (int64_t k = 0; k < 16; ++k) {
      const __m512i left = _mm512_load_si512(b + k * 64), right = _mm512_load_si512(b + kInt8Tile + k * 64);
#pragma GCC unroll 12
      for (int i = 0; i < kInt8Rows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, a + i * kInt8DepthStep + k * 4, 4);
        const __m512i row = _mm512_set1_epi32(four);
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], row, left);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], row, right);
      }
    }
  }
};

// x_q + 128 as [K / 512][strip][12][512]: the strips of a step follow one another in memory as they do in time.
struct PackedInt8Rows {
  const LinearInt8Params& p;
  uint8_t* data;
  int64_t strips;
  float* scale;  // [rows] each, written where x comes unquantised
  int32_t* zero;

  uint8_t* step_of(int64_t strip, int64_t k) const {
    return data + (k / kInt8DepthStep * strips + strip) * kInt8Rows * kInt8DepthStep;
  }

  // Bytes behind the end of a row stay as they are: the weights there are 0.
  template <class X>
  void quantize(int64_t strip) const {
    const __m512i offset = _mm512_set1_epi8(char(0x80));
    for (int64_t i = 0; i < min_of(kInt8Rows, p.rows - strip * kInt8Rows); ++i) {
      const int64_t row = strip * kInt8Rows + i;
      const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
      const RowQuantization quantization = quantization_of(x, p.in_features, false);
      scale[row] = quantization.scale;
      zero[row] = quantization.zero;
      for (int64_t k = 0; k < p.in_features; k += kInt8DepthStep) {
        uint8_t* out = step_of(strip, k) + i * kInt8DepthStep;
        const int64_t n = min_of(kInt8DepthStep, p.in_features - k);
        quantize_row(x + k, n, quantization, reinterpret_cast<int8_t*>(out));
        for (int64_t c = 0; c < n; c += 64)
          _mm512_store_si512(out + c, _mm512_xor_si512(_mm512_load_si512(out + c), offset));
      }
    }
  }

  void pack(int64_t strip) const {
    if (p.x_q) return copy(strip);
    INTERNVIT_DISPATCH(p.x_dtype, X, quantize<X>(strip));
  }

  void copy(int64_t strip) const {
    const __m512i offset = _mm512_set1_epi8(char(0x80));
    for (int64_t k = 0; k < p.in_features; k += kInt8DepthStep) {
      uint8_t* out = step_of(strip, k);
      for (int64_t i = 0; i < kInt8Rows; ++i) {
        const int64_t row = strip * kInt8Rows + i;
        for (int64_t c = 0; c < kInt8DepthStep; c += 64) {
          const __mmask64 mask = row < p.rows ? byte_mask(p.in_features - k - c) : __mmask64(0);
          const int8_t* x = p.x_q + (mask ? row * p.x_stride + k + c : 0);
          _mm512_store_si512(out + i * kInt8DepthStep + c, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x), offset));
        }
      }
    }
  }
};

template <class T>
void linear_int8_as(LinearInt8Params p, const Executor& executor) {
  const int64_t strips = (p.rows + kInt8Rows - 1) / kInt8Rows, depth = (p.in_features + 63) / 64;
  const int64_t panels = (p.out_features + kInt8Panel - 1) / kInt8Panel;
  const int64_t row_blocks = (strips + kInt8RowBlock - 1) / kInt8RowBlock, strip_sums = kInt8Rows * kInt8Panel;
  const int64_t packed_bytes = strips * kInt8Rows * round_up(p.in_features, kInt8DepthStep);
  uint8_t* shared = static_cast<uint8_t*>(executor.shared(packed_bytes + (p.x_q ? 0 : p.rows * 8)));
  float* scale = reinterpret_cast<float*>(shared + packed_bytes);
  int32_t* zero = reinterpret_cast<int32_t*>(scale + p.rows);
  const PackedInt8Rows x{p, shared, strips, scale, zero};
  if (!p.x_q) {
    p.x_scale = scale;
    p.x_zero = zero;
  }
  const int32_t* starts = first_sums(const_cast<int8_t*>(p.packed_weight), panels, depth);
  parallel(executor, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) x.pack(strip);
  });
  parallel(executor, panels * row_blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first_panel = begin / row_blocks, last_panel = (end + row_blocks - 1) / row_blocks;
    const int64_t words = (last_panel - first_panel) * kInt8RowBlock * strip_sums;
    int32_t* all_sums = static_cast<int32_t*>(executor.scratch(words * int64_t(sizeof(int32_t))));
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first_strip = strips * block / row_blocks, last_strip = strips * (block + 1) / row_blocks;
      for (int64_t outer = 0; outer < depth; outer += kInt8DepthBlock / 64) {
        const int64_t outer_end = min_of(depth, outer + kInt8DepthBlock / 64);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t unit = panel * row_blocks + block;
          if (unit < begin || unit >= end) continue;
          const Int8Epilogue<T> epilogue(p, panel, starts + panel * kInt8Panel);
          int32_t* panel_sums = all_sums + (panel - first_panel) * kInt8RowBlock * strip_sums;
          for (int64_t d = outer; d < outer_end; d += kInt8DepthStep / 64) {
            const int64_t step_end = min_of(d + kInt8DepthStep / 64, outer_end);
            for (int64_t strip = first_strip; strip < last_strip; ++strip) {
              int32_t* sums = panel_sums + (strip - first_strip) * strip_sums;
              const int64_t rows = min_of(kInt8Rows, p.rows - strip * kInt8Rows);
              const bool last = step_end == depth;
              for (int64_t i = 0; last && i < rows; ++i) __builtin_prefetch(epilogue.row_of(strip * kInt8Rows + i), 1);
              VnniBlock product;
              if (d == 0) {
                product.start(starts + panel * kInt8Panel);
              } else {
                product.load_from(sums);
              }
              const uint8_t* a = x.step_of(strip, d * 64);
              for (int64_t t = d; t < step_end; ++t)
                product.add(a + (t - d) * 64, p.packed_weight + (panel * depth + t) * 2 * kInt8Tile);
              if (!last) {
                product.store_to(sums);
                continue;
              }
#pragma GCC unroll 12
              for (int i = 0; i < kInt8Rows; ++i)
                if (i < rows) epilogue.finish_row(strip * kInt8Rows + i, product.acc[i][0], product.acc[i][1]);
            }
          }
        }
      }
    }
  });
}

void linear_int8(const LinearInt8Params& p, const Executor& executor) {
  if (p.dtype == kBFloat16) {
    linear_int8_as<bf16>(p, executor);
  } else {
    linear_int8_as<float>(p, executor);
  }
}

}  // namespace internvit::INTERNVIT_ISA
