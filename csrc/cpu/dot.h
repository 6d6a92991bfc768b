// Products of bf16 by VDPBF16PS: acc[i][j] += A[i] B[j], 12 rows times two vectors of 16 columns, in 24 registers.
//
// Each step of a pair of depths loads two vectors of B and broadcasts twelve pairs of A: 24 products, 12 cycles where two
// start in a cycle (Zen 5), for 14 loads. A has a row stride known to the compiler, so that every address is one base and
// a constant.
namespace internvit::INTERNVIT_ISA {

constexpr int64_t kDotRows = 12;

struct DotBlock {
  __m512 acc[kDotRows][2];

  INTERNVIT_INLINE void zero() {
#pragma GCC unroll 12
    for (int i = 0; i < kDotRows; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  }

  // Adds `pairs` pairs of depth: a [12][kStride], b0 and b1 [pairs][16 columns][2].
  template <int64_t kStride>
  INTERNVIT_INLINE void add(const bf16* a, const bf16* b0, const bf16* b1, int64_t pairs) {
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512bh left_column = (__m512bh)_mm512_load_si512(b0 + k * 32);
      const __m512bh right_column = (__m512bh)_mm512_load_si512(b1 + k * 32);
#pragma GCC unroll 12
      for (int i = 0; i < kDotRows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a + i * kStride + k * 2, 4);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], row, left_column);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], row, right_column);
      }
    }
  }
};

}  // namespace internvit::INTERNVIT_ISA
