// The product of a strip of 6 rows with a panel of int8 by VPMADDWD: linear_int8.h.
#pragma once

#include "cpu/ops/linear_int8.h"
#include "cpu/simd/madd.h"

namespace internvit::INTERNVIT_ISA {

// x_q + 128 as int16, [K / 256][strip][128][6][2]. A panel's step is widened to int16 once for all strips of a block,
// 16 KiB, and stays in L1 beside a strip's. Blocks of 256 KiB, which fit Zen 3's L2, took 4 to 11 % longer.
struct MaddLayout {
  static constexpr int64_t kRows = kMaddRows, kPackedRows = kRows, kStep = 4, kBlockBytes = 1024 * 1024;
  static constexpr int64_t kTileBytes = kRows * kInt8Depth * int64_t(sizeof(int16_t));
  struct Scope {};
  struct Weights {
    alignas(64) int16_t data[kStep * kInt8Tile];  // [pairs][32][2]
    INTERNVIT_INLINE void start(const int8_t* packed, int64_t step) {
      for (int64_t i = 0; i < step * kInt8Tile; i += 16) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(packed + i)));
        _mm256_store_si256((__m256i*)(data + i), wide);
      }
    }
  };

  static constexpr int64_t strip_bytes(int64_t depth) { return round_up(depth, kStep) * kTileBytes; }
  INTERNVIT_INLINE static int64_t offset(int64_t strips, int64_t, int64_t strip, int64_t, int64_t d) {
    return (d / kStep * strips + strip) * kStep * kTileBytes + d % kStep * kTileBytes;
  }
  INTERNVIT_INLINE static void store_rows(uint8_t* tile, const uint8_t (&bytes)[kPackedRows][kInt8Depth]) {
    for (int64_t k = 0; k < kInt8Depth; k += 16, tile += 8 * kMaddPair * int64_t(sizeof(int16_t))) {
      __m256 row[kRows];
      for (int64_t i = 0; i < kRows; ++i)
        row[i] = _mm256_castsi256_ps(_mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(bytes[i] + k))));
      store_columns(row, reinterpret_cast<float*>(tile));
    }
  }

  INTERNVIT_INLINE static void multiply(const uint8_t* a, const uint8_t*, const int16_t* b, int64_t step,
                                        const int32_t* from, int64_t from_row, int32_t* sums) {
    const int16_t* x = reinterpret_cast<const int16_t*>(a);
    for (int64_t half = 0; half < kPanel; half += kLanes)
      madd_block(x, b + half * 2, step * (kInt8Depth / 2), from + half, from_row, sums + half);
  }
  INTERNVIT_INLINE static void multiply_grouped(const uint8_t* a, const uint8_t*, const int16_t* b, int64_t step,
                                                const int32_t* start, const float* ratio, bool first, float* sums) {
    constexpr int64_t kPairs = kInt8Depth / 2;
    const int16_t* x = reinterpret_cast<const int16_t*>(a);
    for (int64_t half = 0; half < kPanel; half += kLanes)
      madd_grouped_block(x, b + half * 2, step * kPairs, kInt8Group * kPairs, start + half, ratio + half, first,
                         sums + half);
  }
};

using Int8Layout = MaddLayout;

}  // namespace internvit::INTERNVIT_ISA
