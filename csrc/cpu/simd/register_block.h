// The sums of a block of rows times a few vectors of 16 columns, which stay in registers while a product adds to them.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

template <int kRows, int kVectors>
struct RegisterBlock {
  __m512 acc[kRows][kVectors];

  INTERNVIT_INLINE void zero() {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  INTERNVIT_INLINE void load_from(const float* c, int64_t row) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_load_ps(c + i * row + j * 16);
  }
  INTERNVIT_INLINE void store_to(float* c, int64_t row) const {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) _mm512_store_ps(c + i * row + j * 16, acc[i][j]);
  }
};

}  // namespace internvit::INTERNVIT_ISA
