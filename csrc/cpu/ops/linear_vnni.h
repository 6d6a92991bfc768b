// The product of a strip of 12 rows with a panel of int8 by VPDPBUSD: linear_int8.h.
#pragma once

#include "cpu/ops/linear_int8.h"
#include "cpu/simd/vnni.h"

namespace internvit::INTERNVIT_ISA {

// x_q + 128 as [K / 1024][strip][12][1024]: the strips of a step follow one another in memory as they do in time.
struct VnniLayout {
  static constexpr int64_t kRows = kVnniRows, kBlockBytes = 360 * 1024;
  static constexpr int64_t kStepBytes = kInt8Step * kInt8Depth;
  struct Scope {};

  static constexpr int64_t strip_bytes(int64_t depth) {
    return kRows * ((depth + kInt8Step - 1) / kInt8Step) * kStepBytes;
  }
  INTERNVIT_INLINE static int64_t offset(int64_t strips, int64_t, int64_t strip, int64_t i, int64_t d) {
    return ((d / kInt8Step * strips + strip) * kRows + i) * kStepBytes + d % kInt8Step * kInt8Depth;
  }

  INTERNVIT_INLINE static void multiply(const uint8_t* a, const uint8_t*, const int8_t* b, int64_t step,
                                        const int32_t* from, int64_t from_row, int32_t* sums) {
    vnni_block<kStepBytes>(a, b, step * (kInt8Depth / 4), from, from_row, sums);
  }
  INTERNVIT_INLINE static void multiply_grouped(const uint8_t* a, const uint8_t*, const int8_t* b, int64_t step,
                                                const int32_t* start, const float* ratio, bool first, float* sums) {
    constexpr int64_t kWords = kInt8Depth / 4, kHalf = kRows / 2;
    for (int64_t row = 0; row < kRows; row += kHalf)
      vnni_grouped_block<kStepBytes>(a + row * kStepBytes, b, step * kWords, kInt8Group * kWords, start, ratio, first,
                                     sums + row * kPanel);
  }
};

using Int8Layout = VnniLayout;

}  // namespace internvit::INTERNVIT_ISA
