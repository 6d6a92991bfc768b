// The product of a strip of 32 rows with a panel of int8 by AMX tiles: linear_int8.h.
//
// A tile of x is 16 rows of 64 bytes, one of W 16 words of depth by 16 columns, every second line of what VPDPBUSD
// reads. Not timed: no machine with AMX was at hand.
#pragma once

#include "cpu/ops/linear_int8.h"
#include "cpu/simd/amx.h"

namespace internvit::INTERNVIT_ISA {

struct AmxInt8Layout {  // x_q + 128 as A tiles [strip][K / 64][2][16][64]
  static constexpr int64_t kRows = 32, kPackedRows = 1, kStep = 16, kBlockBytes = 1024 * 1024, kTileBytes = 1024;
  using Scope = TileScope;
  using Weights = PackedWeights;

  static constexpr int64_t strip_bytes(int64_t depth) { return depth * 2 * kTileBytes; }
  INTERNVIT_INLINE static int64_t offset(int64_t, int64_t depth, int64_t strip, int64_t i, int64_t d) {
    return ((strip * depth + d) * 2 + i / 16) * kTileBytes + i % 16 * 64;
  }

  INTERNVIT_INLINE static void store_rows(uint8_t* tile, const uint8_t (&bytes)[kPackedRows][kInt8Depth]) {
    _mm512_store_si512(tile, _mm512_load_si512(bytes[0]));
  }

  INTERNVIT_INLINE static void multiply(const uint8_t* a, const uint8_t* next, const int8_t* b, int64_t step,
                                        const int32_t* from, int64_t from_row, int32_t* sums) {
    const int64_t bytes = from_row * int64_t(sizeof(int32_t));
    _tile_loadd(0, from, bytes);
    _tile_loadd(1, from + 16, bytes);
    _tile_loadd(2, from + 16 * from_row, bytes);
    _tile_loadd(3, from + 16 * from_row + 16, bytes);
    for (int64_t d = 0; d < step; ++d) {
      _tile_loadd(6, b, 128);
      _tile_loadd(4, a, 64);
      _tile_loadd(7, b + 64, 128);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, a + kTileBytes, 64);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      // As in linear_amx.h: x streams from L2.
      const uint8_t* ahead = d + 2 < step ? a + 4 * kTileBytes : next + (d + 2 - step) * 2 * kTileBytes;
      for (int i = 0; i < 32; ++i) _mm_prefetch(reinterpret_cast<const char*>(ahead + i * 64), _MM_HINT_T0);
      a += 2 * kTileBytes;
      b += kInt8Tile;
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * kPanel, 128);
    _tile_stored(3, sums + 16 * kPanel + 16, 128);
  }
  // As many cycles for sums between tiles and registers as for products: groups are dear here.
  INTERNVIT_INLINE static void multiply_grouped(const uint8_t* a, const uint8_t* next, const int8_t* b, int64_t step,
                                                const int32_t* start, const float* ratio, bool first, float* sums) {
    alignas(64) int32_t group_sums[kRows * kPanel];
    for (int64_t d = 0; d < step; d += kInt8Group, start += kPanel, ratio += kPanel) {
      const int64_t tiles = min_of(kInt8Group, step - d);
      const uint8_t *group = a + d * 2 * kTileBytes, *after = group + tiles * 2 * kTileBytes;
      multiply(group, d + tiles < step ? after : next, b + d * kInt8Tile, tiles, start, 0, group_sums);
      for (int64_t i = 0; i < kRows * kPanel; i += kLanes) {
        const Vec sum = {_mm512_cvtepi32_ps(_mm512_load_si512(group_sums + i))};
        store(sums + i, fma(sum, load(ratio + i % kPanel), first && d == 0 ? broadcast(0.0f) : load(sums + i)));
      }
    }
  }
};

using Int8Layout = AmxInt8Layout;

}  // namespace internvit::INTERNVIT_ISA
