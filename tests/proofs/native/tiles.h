// AMX tiles in software, for machines without them: force-included before a unit is compiled, it stands in for the
// intrinsics. Each thread has its own tiles; to use one that no configuration covers, or to leave a thread's tiles
// configured (another library would find them in its way), is a trap, as it would be a fault or a fault of ours.
//
// TDPBUSD: exact sums of unsigned times signed bytes. TDPBF16PS by its definition: even and odd products of a depth of
// 32 summed apart, with one rounding an addition, and both sums added to the accumulator. (The hardware also takes
// subnormals for zero.)
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

namespace emulated {
namespace {

struct Tiles {
  bool configured = false;
  uint16_t bytes[8] = {};
  uint8_t rows[8] = {};
  alignas(64) uint8_t data[8][16][64] = {};
  ~Tiles() {
    if (configured) __builtin_trap();
  }
};
thread_local Tiles tiles;

inline Tiles& in_use(int tile) {
  if (!tiles.configured || !tiles.rows[tile]) __builtin_trap();
  return tiles;
}

inline void load_config(const void* config) {
  const uint8_t* c = static_cast<const uint8_t*>(config);
  if (c[0] != 1 || tiles.configured) __builtin_trap();  // configured twice: a scope within a scope
  tiles.configured = true;
  for (int t = 0; t < 8; ++t) {
    memcpy(&tiles.bytes[t], c + 16 + 2 * t, 2);
    tiles.rows[t] = c[48 + t];
    if (tiles.bytes[t] > 64 || tiles.rows[t] > 16) __builtin_trap();
  }
}

inline void release() { tiles.configured = false; }

inline void zero(int tile) { memset(in_use(tile).data[tile], 0, sizeof tiles.data[tile]); }

inline void load(int tile, const void* base, int64_t stride) {
  Tiles& t = in_use(tile);
  memset(t.data[tile], 0, sizeof t.data[tile]);
  for (int i = 0; i < t.rows[tile]; ++i)
    memcpy(t.data[tile][i], static_cast<const char*>(base) + i * stride, t.bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  const Tiles& t = in_use(tile);
  for (int i = 0; i < t.rows[tile]; ++i) memcpy(static_cast<char*>(base) + i * stride, t.data[tile][i], t.bytes[tile]);
}

// Calls add(row of C, word of A, row of B) for each row of C and word of depth.
template <class Add>
inline void for_products(int c, int a, int b, const Add& add) {
  Tiles& t = in_use(c);
  in_use(a);
  in_use(b);
  for (int i = 0; i < t.rows[c]; ++i) {
    for (int k = 0; k < t.bytes[a] / 4; ++k) {
      int32_t word;
      memcpy(&word, t.data[a][i] + 4 * k, 4);
      add(i, _mm512_set1_epi32(word), _mm512_load_si512(t.data[b][k]));
    }
  }
}

inline void multiply_bf16(int c, int a, int b) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  __m512 even[16] = {}, odd[16] = {};
  for_products(c, a, b, [&](int i, __m512i left, __m512i right) {
    even[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), even[i]);
    odd[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, high)),
                             _mm512_castsi512_ps(_mm512_and_si512(right, high)), odd[i]);
  });
  for (int i = 0; i < tiles.rows[c]; ++i) {
    uint8_t* row = tiles.data[c][i];
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(even[i], odd[i])));
  }
}

inline void multiply_int8(int c, int a, int b) {
  for_products(c, a, b, [&](int i, __m512i left, __m512i right) {
    uint8_t* row = tiles.data[c][i];
    _mm512_store_si512(row, _mm512_dpbusd_epi32(_mm512_load_si512(row), left, right));
  });
}

}  // namespace
}  // namespace emulated

#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply_bf16(c, a, b)
#define _tile_dpbusd(c, a, b) emulated::multiply_int8(c, a, b)
