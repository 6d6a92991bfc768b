// The product of a strip of 32 rows with a panel by AMX tiles: linear.h.
#pragma once

#include "cpu/ops/linear.h"
#include "cpu/simd/amx.h"

namespace internvit::INTERNVIT_ISA {

struct AmxProduct : Bf16Operands<bf16, 256> {  // packed_x: A tiles [strip][K / 32][2]
  static constexpr int64_t kRows = 32;
  using Scope = TileScope;

  int64_t row_block() const { return 17; }  // 1.1 MB of x

  void pack_rows(int64_t strip) const {
    bf16* tiles = packed_x + strip * depth * 2 * kTile;
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = strip * kRows + i;
      bf16* out = tiles + i / 16 * kTile + i % 16 * 32;
      for (int64_t d = 0; d < depth; ++d) {
        const __mmask32 mask = row < p.rows ? half_mask(p.in_features - d * 32) : __mmask32(0);
        _mm512_store_si512(out + d * 2 * kTile, _mm512_maskz_loadu_epi16(mask, p.x + row * p.x_stride + d * 32));
      }
    }
  }

  // Over `step` tiles of 32 from depth `from` on; `sums` [32][32] carries over to the next step.
  INTERNVIT_INLINE void multiply(int64_t panel, int64_t strip, int64_t next_strip, int64_t from, int64_t step,
                                 float* sums, const Epilogue& epilogue) const {
    const bf16* b = weight(panel, from);
    const bf16* a = packed_x + (strip * depth + from) * 2 * kTile;
    const bf16* next = packed_x + (next_strip * depth + from) * 2 * kTile;
    if (from == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, 128);
      _tile_loadd(1, sums + 16, 128);
      _tile_loadd(2, sums + 512, 128);
      _tile_loadd(3, sums + 528, 128);
    }
    for (int64_t d = 0; d < step; ++d) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      // x streams from L2 and the hardware does not run ahead far enough: ask for the tiles two steps on, and the next
      // strip's sums (1.6 to 1.85 TFLOP/s over the four shapes, two cores of a busy Xeon with AMX).
      const bf16* ahead = d + 2 < step ? a + 4 * kTile : next + (d + 2 - step) * 2 * kTile;
      for (int i = 0; i < 32; ++i) _mm_prefetch(reinterpret_cast<const char*>(ahead + i * 32), _MM_HINT_T0);
      for (int i = 0; i < 8; ++i)
        _mm_prefetch(reinterpret_cast<const char*>(sums + 1024 + d * 128 + i * 16), _MM_HINT_T0);
      a += 2 * kTile;
      b += 2 * kTile;
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
    if (from + step < depth) return;
    for (int64_t i = 0; i < min_of(kRows, p.rows - strip * kRows); ++i)
      epilogue.finish_row(strip * kRows + i, load(sums + i * kPanel), load(sums + i * kPanel + 16));
  }
};

}  // namespace internvit::INTERNVIT_ISA
