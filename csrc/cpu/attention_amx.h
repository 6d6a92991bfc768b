// Attention for bf16 with AMX tiles.
//
//   P = exp2(q' k^T * key_scale[j] - shift[i]),  out = P v / sum P
//   without weights: q' = q, key_scale = scale * log2(e)
//   with weights:    q' = q * rstd_q * q_weight * k_weight * scale * log2(e) rounded once, key_scale[j] = rstd_k[j]
//
// A task packs K and V of a head into tiles once; a unit is a strip of 32 queries. Scores go through blocks of 128 keys
// that stay in L1. While the vector unit turns block b into probabilities, the tile unit computes the scores of block
// b + 1 and the product of block b - 1 with V: one step of four tile products after every few rows of exp.
//
// There is no maximum to search. |q'| |k| bounds every score, shift = max(1/8, bound - 32) keeps P below 2^32, and P in
// bf16 has float32's range, so nothing is lost unless a row's true maximum lies more than 90 powers of two under its
// bound. That shows in its sum; such a strip is computed again with exact maxima.
namespace internvit::INTERNVIT_ISA {

constexpr int64_t kGroup = 32;                     // keys of two score tiles
constexpr int64_t kGroups = 12;                     // groups of a block
constexpr float kHeadroom = 32.0f;                 // P <= 2^32, so 1e18 * P summed over all keys stays finite
// Where all scores are near 0, P just under 1 has half the rounding error of P just over 1.
constexpr float kLeastShift = 0.125f;
constexpr float kLeastSum = 8.6736173798840355e-19f;  // 2^-60

struct AttentionAmxScratch {
  bf16 *keys, *values;   // B tiles [group][2][D / 32] and [D / 32][group][2]
  float* key_scale;      // [keys]
  bf16* queries;         // A tiles [D / 32][2]
  float* scores[2];      // [group][32 rows][32 keys]
  bf16* probabilities[2];  // A tiles [group][2]
  float* out;            // accumulators [D / 32][2 columns][2 rows]
  float* sums;           // [32 rows][16 lanes]
  float* shift;          // [32]
  int64_t groups, depth;
  int64_t bytes;
  AttentionAmxScratch(void* memory, int64_t tokens, int64_t head_dim) {
    groups = (tokens + kGroup - 1) / kGroup;
    depth = (head_dim + 31) / 32;
    Carve carve{static_cast<char*>(memory)};
    keys = carve.take<bf16>(groups * 2 * depth * kTile);
    values = carve.take<bf16>(groups * 2 * depth * kTile);
    key_scale = carve.take<float>(groups * kGroup);
    queries = carve.take<bf16>(depth * 2 * kTile);
    for (int i = 0; i < 2; ++i) scores[i] = carve.take<float>(kGroups * kStrip * kGroup);
    for (int i = 0; i < 2; ++i) probabilities[i] = carve.take<bf16>(kGroups * 2 * kTile);
    out = carve.take<float>(depth * 4 * 256);
    sums = carve.take<float>(kStrip * kLanes);
    shift = carve.take<float>(kStrip);
    bytes = carve.used;
  }
};

// Packs a head; returns the largest |k| * key_scale.
inline float attention_pack_amx(const AttentionParams& p, const AttentionAmxScratch& s, int64_t b, int64_t h) {
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t n = g * kGroup, left = p.tokens - n;
    // Tokens lie 3 C apart: no hardware prefetcher follows. Ask for the next group's lines while this one is packed.
    for (int64_t i = kGroup; i < min_of(2 * kGroup, left); ++i) {
      const char* k = reinterpret_cast<const char*>(token<bf16>(p.k, b, n + i, h));
      const char* v = reinterpret_cast<const char*>(token<bf16>(p.v, b, n + i, h));
      for (int64_t byte = 0; byte < p.head_dim * 2; byte += 64) {
        _mm_prefetch(k + byte, _MM_HINT_T0);
        _mm_prefetch(v + byte, _MM_HINT_T0);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t rows = min_of(16, left - half * 16);
      for (int64_t d = 0; d < s.depth; ++d) {
        const bf16* k = token<bf16>(p.k, b, rows > 0 ? n + half * 16 : n, h) + d * 32;
        pack_columns(k, p.k.stride_n, rows, p.head_dim - d * 32, s.keys + ((g * 2 + half) * s.depth + d) * kTile);
        const int64_t cols = p.head_dim - d * 32 - half * 16;
        const bf16* v = token<bf16>(p.v, b, n, h) + d * 32 + (cols > 0 ? half * 16 : 0);
        pack_depth(v, p.v.stride_n, left, cols, s.values + ((d * s.groups + g) * 2 + half) * kTile);
      }
    }
  }
  float largest = 0;
  for (int64_t n = 0; n < p.tokens; ++n) {
    const bf16* k = token<bf16>(p.k, b, n, h);
    Sum squares;
    const Vec shrink = broadcast(kShrink);
    for_lanes(p.head_dim, INTERNVIT_BODY(c, lanes, u) {
      const Vec x = load(k + c, lanes) * shrink;
      squares.part[u] = fma(x, x, squares.part[u]);
    });
    s.key_scale[n] = p.rstd_k ? p.rstd_k[b * p.tokens + n] : p.scale * kLog2E;
    const float norm = __builtin_sqrtf(squares.total()) * (1 / kShrink) * __builtin_fabsf(s.key_scale[n]);
    largest = norm > largest || norm != norm ? norm : largest;
  }
  for (int64_t n = p.tokens; n < s.groups * kGroup; ++n) s.key_scale[n] = 0;
  return largest;
}

// Fills the strip's A tiles and the shift of each row; whether the bound is small enough to be used.
inline bool attention_queries_amx(const AttentionParams& p, const AttentionAmxScratch& s, int64_t b, int64_t h,
                                  int64_t first, int64_t rows, float largest_key) {
  bool usable = true;
  const float factor = p.scale * kLog2E;
  for (int64_t i = 0; i < kStrip; ++i) {
    Vec squares = broadcast(0.0f);
    for (int64_t d = 0; d < s.depth; ++d) {
      bf16* row = s.queries + (d * 2 + i / 16) * kTile + i % 16 * 32;
      Vec part[2] = {broadcast(0.0f), broadcast(0.0f)};
      for (int64_t half = 0; half < 2 && i < rows; ++half) {
        const int64_t c = d * 32 + half * 16, n = min_of(16, p.head_dim - c), t = first + i;
        if (n <= 0) continue;
        Vec x = load(token<bf16>(p.q, b, t, h) + c, n);
        if (p.q_weight) {
          const int64_t channel = h * p.head_dim + c;
          x = x * broadcast(p.rstd_q[b * p.tokens + t] * factor) * load(p.q_weight + channel, n) *
              load(p.k_weight + channel, n);
        }
        const Vec small = x * broadcast(kShrink);
        squares = fma(small, small, squares);
        part[half] = x;
      }
      _mm512_store_si512(row, narrow_pair(part[0], part[1]));
    }
    const float bound = __builtin_sqrtf(sum(squares)) * (1 / kShrink) * largest_key * 1.01f;
    usable &= bound < 16384.0f;
    s.shift[i] = bound > kHeadroom + kLeastShift ? bound - kHeadroom : kLeastShift;
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
  Vec total = load(s.sums + i * kLanes), other = broadcast(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    Vec p[2];
    for (int u = 0; u < 2; ++u) {
      const Vec score = load(scores + g * 1024 + u * 16), key_scale = load(scale + g * kGroup + u * 16);
      // The exact maximum was taken of the rounded product: subtract it from that, or a score of 1e37 leaves a rest.
      const Vec x = kExact ? Vec{_mm512_sub_ps(_mm512_mul_round_ps(score.v, key_scale.v, 8), shift.v)}
                           : Vec{_mm512_fmsub_ps(score.v, key_scale.v, shift.v)};
      p[u] = exp2_bf16(x);
    }
    if (g == groups - 1) {
      p[0] = {_mm512_maskz_mov_ps(__mmask16(last), p[0].v)};
      p[1] = {_mm512_maskz_mov_ps(__mmask16(last >> 16), p[1].v)};
    }
    total = total + p[0];
    other = other + p[1];
    _mm512_store_si512(out + g * 2 * kTile, narrow_pair(p[0], p[1]));
  }
  store(s.sums + i * kLanes, total + other);
}

INTERNVIT_INLINE uint32_t last_group_mask(int64_t tokens, int64_t group) {
  return uint32_t(half_mask(tokens - group * kGroup));
}

// Each row's exact maximum of score * key_scale, into shift.
inline void exact_shift(const AttentionParams& p, const AttentionAmxScratch& s, const AttentionTiles& tiles, int64_t rows) {
  const int64_t blocks = (s.groups + kGroups - 1) / kGroups;
  for (int64_t i = 0; i < rows; ++i) s.shift[i] = -__builtin_inff();
  for (int64_t block = 0; block < blocks; ++block) {
    tiles.scores_of(block);
    const int64_t keys = min_of(kGroups * kGroup, p.tokens - block * kGroups * kGroup);
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
  __builtin_memset(s.sums, 0, sizeof(float) * kStrip * kLanes);
  const int64_t reciprocal_rows = 65536 / rows;
  tiles.scores_of(0);
  for (int64_t block = 0; block <= blocks; ++block) {
    // Steps of the tile unit: scores of the next block, then P v of the one before.
    const int64_t next = block + 1 < blocks ? tiles.groups_of(block + 1) : 0, before = tiles.groups_of(block - 1);
    const int64_t score_steps = next * s.depth, steps = score_steps + before * s.depth;
    const int64_t groups = block < blocks ? tiles.groups_of(block) : 0;
    const uint32_t last = last_group_mask(p.tokens, block * kGroups + groups - 1);
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
    p.lse[(b * p.heads + h) * p.tokens + t] = float(double(s.shift[i]) * double(kLn2) + __builtin_log(double(total)));
    bf16* out = static_cast<bf16*>(p.out) + ((b * p.tokens + t) * p.heads + h) * p.head_dim;
    const Vec inverse = broadcast(1.0f / total);
    const float* accumulators = s.out + i / 16 * 256 + i % 16 * 16;
    for_lanes(p.head_dim, INTERNVIT_BODY(c, lanes, u) {
      store(out + c, load(accumulators + c / 16 * 512) * inverse, lanes);
    });
  }
}

void attention_amx(const AttentionParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16) return attention(p, executor);
  parallel(executor, strip_count(p), 1, [&](int64_t begin, int64_t end) {
    const AttentionAmxScratch s(
        executor.scratch(AttentionAmxScratch(nullptr, p.tokens, p.head_dim).bytes), p.tokens, p.head_dim);
    const TileScope tiles;
    float largest_key = 0;
    for_strips(
        begin, end, p.heads, p.tokens,
        [&](int64_t b, int64_t h) { largest_key = attention_pack_amx(p, s, b, h); },
        [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
          attention_strip_amx(p, s, b, h, first, rows, largest_key);
        });
  });
}

}  // namespace internvit::INTERNVIT_ISA
