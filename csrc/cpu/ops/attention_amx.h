// Attention for bf16 with AMX tiles, on what attention_bf16.h describes.
//
// A task packs K and V of a head into tiles once; a unit is a strip of 32 queries. Scores go through blocks of 384
// keys. While the vector unit turns block b into probabilities, the tile unit computes the scores of block b + 1 and
// the product of block b - 1 with V: one step of four tile products after every few rows of exp.
//
// As in attention_avx512bf16.h the output is divided by the sum of the probabilities as rounded, lse takes them as they
// were.
#pragma once

#include "cpu/ops/attention_bf16.h"
#include "cpu/simd/amx.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kGroups = 12;     // groups of a block
constexpr int64_t kTileStrip = 32;  // queries of two tiles

struct AttentionAmxScratch : PackedHead {
  bf16* queries;               // A tiles [D / 32][2]
  float* scores[2];            // [group][32 rows][32 keys]
  bf16* probabilities[2];      // A tiles [group][2]
  float* out;                  // accumulators [D / 32][2 columns][2 rows]
  float *sums, *rounded_sums;  // [32 rows][16 lanes]
  float* shift;                // [32]
  int64_t bytes;
  AttentionAmxScratch(ScratchArena arena, int64_t n_keys, int64_t head_dim) : PackedHead(arena, n_keys, head_dim) {
    queries = arena.take<bf16>(depth * 2 * kTile);
    for (int i = 0; i < 2; ++i) scores[i] = arena.take<float>(kGroups * kTileStrip * kGroup);
    for (int i = 0; i < 2; ++i) probabilities[i] = arena.take<bf16>(kGroups * 2 * kTile);
    out = arena.take<float>(depth * 4 * 256);
    sums = arena.take<float>(kTileStrip * kLanes);
    rounded_sums = arena.take<float>(kTileStrip * kLanes);
    shift = arena.take<float>(kTileStrip);
    bytes = arena.used;
  }
};

// Fills the strip's A tiles and the shift of each row; whether the bound is small enough to be used.
inline bool attention_queries_amx(const AttentionParams& p, const AttentionAmxScratch& s, int64_t b, int64_t h,
                                  int64_t first, int64_t rows, float largest_key) {
  bool usable = true;
  for (int64_t i = 0; i < kTileStrip; ++i) {
    bf16* row = s.queries + i / 16 * kTile + i % 16 * 32;
    float bound = 0;
    if (i < rows) {
      bound = query_norm(fold_query(p, b, h, first + i, s.depth, row, 2 * kTile)) * largest_key * 1.01f;
    } else {
      no_query(s.depth, row, 2 * kTile);
    }
    usable &= bound < kLargestBound;
    s.shift[i] = shift_for(bound);
  }
  return usable;
}

// The tile unit's share of a strip: a sequence of steps of at most four products.
struct AttentionTiles {
  const AttentionAmxScratch& s;
  bool two;  // the strip fills both row tiles

  INTERNVIT_INLINE void score_step(int64_t group, int64_t d, float* scores) const {
    if (d == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const bf16* a = s.queries + d * 2 * kTile;
    const bf16* k = s.keys + (group * 2 * s.depth + d) * kTile;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, k, 64);
    _tile_loadd(7, k + s.depth * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (d == s.depth - 1) {
      _tile_stored(0, scores, 128);
      _tile_stored(1, scores + 16, 128);
      if (two) {
        _tile_stored(2, scores + 512, 128);
        _tile_stored(3, scores + 528, 128);
      }
    }
  }

  // The product of group `g` of a block (its place among all groups: `group`) with columns d of V.
  INTERNVIT_INLINE void value_step(int64_t group, int64_t g, int64_t groups, int64_t d, const bf16* p) const {
    float* out = s.out + d * 4 * 256;
    if (g == 0) {
      if (group == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + 256, 64);
        _tile_loadd(2, out + 512, 64);
        _tile_loadd(3, out + 768, 64);
      }
    }
    const bf16* v = s.values + (d * s.groups + group) * 2 * kTile;
    _tile_loadd(4, p + g * 2 * kTile, 64);
    _tile_loadd(6, v, 64);
    _tile_loadd(7, v + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    if (two) {
      _tile_loadd(5, p + (g * 2 + 1) * kTile, 64);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (g == groups - 1) {
      _tile_stored(0, out, 64);
      _tile_stored(1, out + 256, 64);
      _tile_stored(2, out + 512, 64);
      _tile_stored(3, out + 768, 64);
    }
  }

  INTERNVIT_INLINE int64_t groups_of(int64_t block) const {
    return block < 0 ? 0 : min_of(kGroups, s.groups - block * kGroups);
  }
  INTERNVIT_INLINE void scores_of(int64_t block) const {
    for (int64_t g = 0; g < groups_of(block); ++g)
      for (int64_t d = 0; d < s.depth; ++d) score_step(block * kGroups + g, d, s.scores[block & 1] + g * 1024);
  }
};

// Row `i` of a block: scores to probabilities, their sum added to the row's. `last` masks the keys beyond the end.
template <bool kExact>
INTERNVIT_INLINE void exp_row(const AttentionAmxScratch& s, int64_t block, int64_t i, int64_t groups, uint32_t last) {
  const float* scores = s.scores[block & 1] + i * kGroup;
  const float* scale = s.key_scale + block * kGroups * kGroup;
  bf16* out = s.probabilities[block & 1] + i / 16 * kTile + i % 16 * 32;
  const Vec shift = broadcast(s.shift[i]);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vec total = load(s.sums + i * kLanes), other = broadcast(0.0f), rounded = load(s.rounded_sums + i * kLanes);
  for (int64_t g = 0; g < groups; ++g) {
    Vec p[2];
    for (int u = 0; u < 2; ++u) {
      const Vec score = load(scores + g * 1024 + u * 16), key_scale = load(scale + g * kGroup + u * 16);
      p[u] = probability<kExact>(score, key_scale, shift);
    }
    if (g == groups - 1) {
      p[0] = {_mm512_maskz_mov_ps(__mmask16(last), p[0].v)};
      p[1] = {_mm512_maskz_mov_ps(__mmask16(last >> 16), p[1].v)};
    }
    total = total + p[0];
    other = other + p[1];
    const __m512i pair = narrow_pair(p[0], p[1]);
    rounded = {_mm512_dpbf16_ps(rounded.v, (__m512bh)pair, ones)};
    _mm512_store_si512(out + g * 2 * kTile, pair);
  }
  store(s.sums + i * kLanes, total + other);
  store(s.rounded_sums + i * kLanes, rounded);
}

// Each row's exact maximum of score * key_scale, into shift.
inline void exact_shift(const AttentionParams& p, const AttentionAmxScratch& s, const AttentionTiles& tiles,
                        int64_t rows) {
  const int64_t blocks = (s.groups + kGroups - 1) / kGroups;
  for (int64_t i = 0; i < rows; ++i) s.shift[i] = -__builtin_inff();
  for (int64_t block = 0; block < blocks; ++block) {
    tiles.scores_of(block);
    const int64_t keys = min_of(kGroups * kGroup, p.keys - block * kGroups * kGroup);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < keys; ++c) {
        const float score = s.scores[block & 1][c / kGroup * 1024 + i * kGroup + c % kGroup];
        const float x = score * s.key_scale[block * kGroups * kGroup + c];
        s.shift[i] = x > s.shift[i] || x != x ? x : s.shift[i];
      }
    }
  }
}

template <bool kExact>
void attention_pass(const AttentionParams& p, const AttentionAmxScratch& s, const AttentionTiles& tiles, int64_t rows) {
  const int64_t blocks = (s.groups + kGroups - 1) / kGroups;
  __builtin_memset(s.sums, 0, sizeof(float) * kTileStrip * kLanes);
  __builtin_memset(s.rounded_sums, 0, sizeof(float) * kTileStrip * kLanes);
  const int64_t reciprocal_rows = 65536 / rows;
  tiles.scores_of(0);
  for (int64_t block = 0; block <= blocks; ++block) {
    // Steps of the tile unit: scores of the next block, then P v of the one before.
    const int64_t next = block + 1 < blocks ? tiles.groups_of(block + 1) : 0, before = tiles.groups_of(block - 1);
    const int64_t score_steps = next * s.depth, steps = score_steps + before * s.depth;
    const int64_t groups = block < blocks ? tiles.groups_of(block) : 0;
    const uint32_t last = last_group_mask(p.keys, block * kGroups + groups - 1);
    int64_t step = 0, g = 0, d = 0, due = -steps;
    const auto advance = [&](int64_t until) __attribute__((always_inline)) {
      for (; step < until; ++step) {
        if (step < score_steps) {
          tiles.score_step((block + 1) * kGroups + g, d, s.scores[(block + 1) & 1] + g * 1024);
          if (++d == s.depth) d = 0, ++g;
          if (step + 1 == score_steps) g = d = 0;
        } else {
          tiles.value_step((block - 1) * kGroups + g, g, before, d, s.probabilities[(block - 1) & 1]);
          if (++g == before) g = 0, ++d;
        }
      }
    };
    if (groups) {
      for (int64_t i = 0; i < rows; ++i) {
        due += steps;  // step / rows of the block's work is to be under way before row i
        advance((due * reciprocal_rows) >> 16);
        exp_row<kExact>(s, block, i, groups, last);
      }
    }
    advance(steps);
  }
}

inline void attention_strip_amx(const AttentionParams& p, const AttentionAmxScratch& s, int64_t b, int64_t h,
                                int64_t first, int64_t rows, float largest_key) {
  const AttentionTiles tiles{s, rows > 16};
  bool good = attention_queries_amx(p, s, b, h, first, rows, largest_key);
  if (good) {
    attention_pass<false>(p, s, tiles, rows);
    for (int64_t i = 0; i < rows; ++i) good &= sum(load(s.sums + i * kLanes)) > kLeastSum;
  }
  if (!good) {
    exact_shift(p, s, tiles, rows);
    attention_pass<true>(p, s, tiles, rows);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float total = sum(load(s.sums + i * kLanes));
    const int64_t t = first + i;
    p.lse[(b * p.heads + h) * p.row_stride + t] =
        float(double(s.shift[i]) * double(kLn2) + __builtin_log(double(total)));
    bf16* out = static_cast<bf16*>(p.out) + ((b * p.tokens + t) * p.heads + h) * p.head_dim;
    const Vec inverse = broadcast(1.0f / sum(load(s.rounded_sums + i * kLanes)));
    const float* accumulators = s.out + i / 16 * 256 + i % 16 * 16;
    for_lanes(p.head_dim, INTERNVIT_BODY(c, lanes, u) { store(out + c, load(accumulators + c / 16 * 512) * inverse, lanes); });
  }
}

void attention_amx(const AttentionParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16) return attention(p, executor);
  const int64_t bytes = AttentionAmxScratch(ScratchArena{nullptr}, p.keys, p.head_dim).bytes;
  for_images<kTileStrip>(
      p, executor, bytes, [](const AttentionParams& image, void* memory, int64_t begin, int64_t end) {
        if (image.keys == 0) return attention_without_keys<bf16>(image, kTileStrip, begin, end);
        const AttentionAmxScratch s(ScratchArena{static_cast<char*>(memory)}, image.keys, image.head_dim);
        const TileScope tiles;
        float largest_key = 0;
        for_strips<kTileStrip>(
            begin, end, image.heads, image.tokens,
            [&](int64_t b, int64_t h) { largest_key = pack_head(image, s, b, h); },
            [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
              attention_strip_amx(image, s, b, h, first, rows, largest_key);
            });
      });
}

}  // namespace internvit::INTERNVIT_ISA
