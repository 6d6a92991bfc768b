// Tiles: eight registers of 16 rows x 64 bytes, in the layouts of bf16.h: a load touches 16 neighbouring lines. A
// product takes 16 cycles; what surrounds it must keep up.
#pragma once

#include "cpu/simd/bf16.h"

namespace internvit::INTERNVIT_ISA {

// Holds the tile configuration for a task. Releasing it afterwards matters: other libraries configure their own, and a
// thread that leaves tiles in use pays for saving them at each context switch.
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
};

}  // namespace internvit::INTERNVIT_ISA
