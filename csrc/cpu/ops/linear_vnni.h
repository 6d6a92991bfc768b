// The product of a strip of 12 rows with a panel of int8 by VPDPBUSD: linear_int8.h.
#pragma once

#include "cpu/ops/linear_int8.h"
#include "cpu/simd/vnni.h"

namespace internvit::INTERNVIT_ISA {

// x_q + 128 as [K / 512][strip][128][12][4]: a strip's step is a stream, and follows the strip before as it does in
// time. A panel's step, 16 KiB, stays in L1 beside it (rows apart and 32 KiB: 13 % slower on Cascade Lake).
struct VnniLayout {
  static constexpr int64_t kRows = kVnniRows, kPackedRows = kRows, kStep = 8, kBlockBytes = 360 * 1024;
  static constexpr int64_t kTileBytes = kRows * kInt8Depth;
  struct Scope {};
  using Weights = PackedWeights;

  static constexpr int64_t strip_bytes(int64_t depth) { return round_up(depth, kStep) * kTileBytes; }
  INTERNVIT_INLINE static int64_t offset(int64_t strips, int64_t, int64_t strip, int64_t, int64_t d) {
    return (d / kStep * strips + strip) * kStep * kTileBytes + d % kStep * kTileBytes;
  }
  INTERNVIT_INLINE static void store_rows(uint8_t* tile, const uint8_t (&bytes)[kPackedRows][kInt8Depth]) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = i < kRows ? _mm512_load_si512(bytes[i]) : _mm512_setzero_si512();
    transpose_words(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(tile + i * kRows * 4, lane_mask(kRows), r[i]);
  }

  INTERNVIT_INLINE static void multiply(const uint8_t* a, const uint8_t*, const int8_t* b, int64_t step,
                                        const int32_t* from, int64_t from_row, int32_t* sums) {
    vnni_block(a, b, step * (kInt8Depth / 4), from, from_row, sums);
  }
  INTERNVIT_INLINE static void multiply_grouped(const uint8_t* a, const uint8_t*, const int8_t* b, int64_t step,
                                                const int32_t* start, const float* ratio, bool first, float* sums) {
    constexpr int64_t kWords = kInt8Depth / 4, kHalf = kRows / 2;
    for (int64_t row = 0; row < kRows; row += kHalf)
      vnni_grouped_block(a + row * 4, b, step * kWords, kInt8Group * kWords, start, ratio, first, sums + row * kPanel);
  }
};

using Int8Layout = VnniLayout;

}  // namespace internvit::INTERNVIT_ISA
