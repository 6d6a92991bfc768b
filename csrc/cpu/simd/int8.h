// Operands of int8 products: W in tiles, x as unsigned bytes.
//
// A tile of W, 2 KiB, is 64 of depth times 32 columns, [words][32 columns][depths of a word]: a word is as many depths
// as one product adds up, 4 of VPDPBUSD and of AMX, 2 of VPMADDWD.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kInt8Depth = 64, kInt8Tile = kInt8Depth * 32;

#if defined(__AVX512VNNI__)
constexpr int64_t kInt8Word = 4;

INTERNVIT_INLINE __mmask64 byte_mask(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : n <= 0 ? __mmask64(0) : (__mmask64(1) << n) - 1;
}

// Half a tile, of up to 16 columns and 64 of depth; adds up each column.
INTERNVIT_INLINE void pack_half_tile(const int8_t* w, int64_t stride, int64_t columns, int64_t depth, int8_t* tile,
                                     int32_t* column_sums) {
  __m512i r[16], sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < 16; ++i)
    r[i] = i < columns ? _mm512_maskz_loadu_epi8(byte_mask(depth), w + i * stride) : _mm512_setzero_si512();
  transpose_words(r);
  for (int64_t i = 0; i < 16; ++i) {
    _mm512_store_si512(tile + i * 2 * 64, r[i]);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), r[i]);
  }
  _mm512_store_si512(column_sums, _mm512_add_epi32(_mm512_load_si512(column_sums), sum));
}

// x_q + 128 of up to 64 elements of a row.
INTERNVIT_INLINE void store_unsigned(uint8_t* bytes, const int8_t* x_q, int64_t n) {
  const __m512i row = _mm512_maskz_loadu_epi8(byte_mask(n), x_q);
  _mm512_store_si512(bytes, _mm512_xor_si512(row, _mm512_set1_epi8(char(0x80))));
}
INTERNVIT_INLINE void store_unsigned(uint8_t* bytes, const Ints (&part)[4]) {
  // Packing works within 128 bits: word j of the result holds four elements of part j % 4.
  const __m512i packed =
      _mm512_packs_epi16(_mm512_packs_epi32(part[0].v, part[1].v), _mm512_packs_epi32(part[2].v, part[3].v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i row = _mm512_permutexvar_epi32(order, packed);
  _mm512_store_si512(bytes, _mm512_xor_si512(row, _mm512_set1_epi8(char(0x80))));
}
#else
constexpr int64_t kInt8Word = 2;

INTERNVIT_INLINE void pack_half_tile(const int8_t* w, int64_t stride, int64_t columns, int64_t depth, int8_t* tile,
                                     int32_t* column_sums) {
  for (int64_t k = 0; k < 64; ++k) {
    int8_t* word = tile + k / kInt8Word * 32 * kInt8Word + k % kInt8Word;
    for (int64_t i = 0; i < 16; ++i) {
      const int8_t value = i < columns && k < depth ? w[i * stride + k] : int8_t(0);
      word[i * kInt8Word] = value;
      column_sums[i] += value;
    }
  }
}

INTERNVIT_INLINE void store_unsigned(uint8_t* bytes, const int8_t* x_q, int64_t n) {
  const int64_t there = min_of(n, 64);
  for (int64_t i = 0; i < there; ++i) bytes[i] = uint8_t(x_q[i] ^ 0x80);
}
INTERNVIT_INLINE void store_unsigned(uint8_t* bytes, const Ints (&part)[4]) {
  // Packing works within 128 bits: word j of the result holds four elements of vector j % 4, of eight.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm256_set1_epi8(char(0x80));
  for (int64_t i = 0; i < 2; ++i) {
    const Ints &x = part[2 * i], &y = part[2 * i + 1];
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b));
    const __m256i row = _mm256_permutevar8x32_epi32(packed, order);
    _mm256_store_si256((__m256i*)(bytes + i * 32), _mm256_xor_si256(row, sign));
  }
}
#endif

}  // namespace internvit::INTERNVIT_ISA
