// Attention for bf16 with VDPBF16PS, on what attention_bf16.h describes.
//
// A task packs K and V of a head once; a unit is a strip of 12 queries. Keys go by in blocks of up to 576. The scores
// of 6 queries and 32 keys are summed in 12 registers while those of the tile before, in 12 others, become
// probabilities and leave for L1 as bf16; then the block's product with V is added to the strip's output. K and V
// stream from L2.
//
// The output is divided by the sum of the probabilities as rounded: their weights add up to 1, and a lone key's value
// comes back to the bit. The log-sum-exp takes the sum before rounding.
#pragma once

#include "cpu/ops/attention_bf16.h"
#include "cpu/simd/vdpbf16.h"

namespace internvit::INTERNVIT_ISA {

// Keys of a block, query rows of a tile of scores, the largest head dimension.
constexpr int64_t kKeyBlock = 576, kTileRows = 6, kMaxHeadDim = 128;

struct AttentionAvx512Bf16Scratch : PackedHead {
  bf16* queries;               // [12][128]
  bf16* probabilities;         // [12][576]
  float* out;                  // [D / 32][12][32]
  float *sums, *rounded_sums;  // [12][16 lanes]
  float *shift, *inverse;      // [16], of 12 rows
  int64_t bytes;
  AttentionAvx512Bf16Scratch(ScratchArena arena, int64_t n_keys, int64_t head_dim)
      : PackedHead(arena, n_keys, head_dim) {
    queries = arena.take<bf16>(kVdpbf16Rows * kMaxHeadDim);
    probabilities = arena.take<bf16>(kVdpbf16Rows * kKeyBlock);
    out = arena.take<float>(kVdpbf16Rows * depth * 32);
    sums = arena.take<float>(kVdpbf16Rows * kLanes);
    rounded_sums = arena.take<float>(kVdpbf16Rows * kLanes);
    shift = arena.take<float>(kLanes);
    inverse = arena.take<float>(kLanes);
    bytes = arena.used;
  }
};

// The unit of work: so many rows of a head from `first` on.
struct Strip {
  int64_t b, h, first, rows;
};

// 2^x for x = score * key_scale - shift, to 6.9e-5 as exp2_bf16; `there`: the lanes that hold keys. Zen 4 starts one
// instruction of multiplications in a cycle, VDPBF16PS or another, and additions beside it: two multiplications here,
// four with exp2_bf16's polynomial. With x = n + r, n the nearest multiple of 1/32,
//
//   2^x = 2^n * (1 + r / 1.4375),  1 / 1.4375 = 0.996 ln 2 (4e-5 of 2^x; n - 1.4375 is one subtraction)
template <bool kExact>
INTERNVIT_INLINE __m512 vdpbf16_probability(__m512 score, const float* key_scale, __m512 shift, __mmask16 there) {
  alignas(64) static constexpr float kPowers[32] = {
      2.78269243f, 2.84362555f, 2.90589285f, 2.96952343f, 3.03454757f, 3.10099554f, 3.16889858f, 3.2382884f,
      3.30919766f, 3.38165975f, 3.45570827f, 3.53137851f, 3.60870576f, 3.68772602f, 1.88423836f, 1.92549777f,
      1.96766067f, 2.01074696f, 2.05477643f, 2.09977031f, 2.14574933f, 2.19273496f, 2.2407496f,  2.28981566f,
      2.33995605f, 2.39119458f, 2.44355488f, 2.49706173f, 2.55174017f, 2.60761595f, 2.66471553f, 2.72306514f};
  constexpr float kMultiples = 393216.0f, kCentre = 1.4375f;  // of 1.5 * 2^18 the last bit is 1/32
  const __m512 scale = _mm512_load_ps(key_scale);
  __m512 x = _mm512_fmsub_ps(score, scale, shift);
  if (kExact) {
    // The exact maximum was taken of the rounded product. Minus infinity would leave no remainder; a NaN stays one.
    x = _mm512_sub_ps(_mm512_mul_round_ps(score, scale, 8), shift);
    x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);
  }
  const __m512 nearest = _mm512_add_ps(x, _mm512_set1_ps(kMultiples));
  const __m512 below = _mm512_sub_ps(nearest, _mm512_set1_ps(kMultiples + kCentre));
  const __m512 power =
      _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(nearest), _mm512_load_ps(kPowers + 16));
  return _mm512_maskz_scalef_ps(there, _mm512_mul_ps(power, _mm512_sub_ps(x, below)), below);
}

// What turns a tile's rows of 32 scores into probabilities, and where those go.
struct TileRows {
  const float *key_scale, *shift;
  float* sums;
  bf16* probabilities;
  uint32_t there;
  TileRows(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s, int64_t row, int64_t group, int64_t g)
      : key_scale(s.key_scale + group * kGroup),
        shift(s.shift + row),
        sums(s.sums + row * kLanes),
        probabilities(s.probabilities + row * kKeyBlock + g * kGroup),
        there(last_group_mask(p.keys, group)) {}

  template <bool kExact>
  INTERNVIT_INLINE void finish(int i, __m512 left_score, __m512 right_score) const {
    const __m512 s = _mm512_set1_ps(shift[i]);
    const Vec left = {vdpbf16_probability<kExact>(left_score, key_scale, s, __mmask16(there))};
    const Vec right = {vdpbf16_probability<kExact>(right_score, key_scale + 16, s, __mmask16(there >> 16))};
    store(sums + i * kLanes, load(sums + i * kLanes) + (left + right));
    _mm512_store_si512(probabilities + i * kKeyBlock, narrow_pair(left, right));
  }
};

using ScoreTile = Vdpbf16BlockOf<kTileRows>;

template <bool kExact>
INTERNVIT_INLINE void finish_tile(const ScoreTile& tile, const TileRows& to) {
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) to.finish<kExact>(i, tile.acc[i][0], tile.acc[i][1]);
}

// The scores of 6 queries and a group of keys, while those of the tile before become probabilities.
template <bool kExact>
INTERNVIT_INLINE ScoreTile next_tile(const AttentionAvx512Bf16Scratch& s, int64_t row, int64_t group,
                                     const ScoreTile& before, const TileRows& to) {
  const bf16 *queries = s.queries + row * kMaxHeadDim, *left = s.keys + group * 2 * s.depth * kTile;
  const bf16* right = left + s.depth * kTile;
  ScoreTile tile;
  tile.zero();
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
    to.finish<kExact>(i, before.acc[i][0], before.acc[i][1]);
    tile.add<kMaxHeadDim, 2, 32>(queries + i * 4, left + i * 64, right + i * 64, 2);
  }
  tile.add<kMaxHeadDim, 2, 32>(queries + 24, left + 384, right + 384, 4);
  for (int64_t d = 1; d < s.depth; ++d)
    tile.add<kMaxHeadDim, 2, 32>(queries + d * 32, left + d * kTile, right + d * kTile, 16);
  return tile;
}

// The probabilities of a last group of at most 16 keys, all 12 rows at once: half the products.
template <bool kExact>
INTERNVIT_INLINE void half_group(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s, int64_t group,
                                 int64_t g) {
  Vdpbf16BlockOf<kVdpbf16Rows, 1> block;
  block.zero();
  const bf16* keys = s.keys + group * 2 * s.depth * kTile;
  for (int64_t d = 0; d < s.depth; ++d)
    block.add<kMaxHeadDim, 2, 32>(s.queries + d * 32, keys + d * kTile, nullptr, 16);
  const TileRows to(p, s, 0, group, g);
#pragma GCC unroll 12
  for (int i = 0; i < kVdpbf16Rows; ++i) to.finish<kExact>(i, block.acc[i][0], _mm512_setzero_ps());
}

// Asks for memory of later use, a row at a time while the strip multiplies: all at once would hold up the strip's own
// loads. Outputs of this strip, queries of the next one, and as many keys and values of the next head. Tokens lie 3 C
// apart: no hardware prefetcher follows.
INTERNVIT_INLINE void prefetch_row(const AttentionParams& p, const Strip& strip, int64_t i) {
  const auto prefetch = [&](const bf16* x) __attribute__((always_inline)) {
    for (int64_t d = 0; d < p.head_dim; d += 32) _mm_prefetch(reinterpret_cast<const char*>(x + d), _MM_HINT_T0);
  };
  const int64_t t = strip.first + i, next = strip.b * p.heads + strip.h + 1;
  if (i >= strip.rows) return;
  prefetch(static_cast<const bf16*>(p.out) + ((strip.b * p.tokens + t) * p.heads + strip.h) * p.head_dim);
  if (t + kVdpbf16Rows < p.tokens) prefetch(token<bf16>(p.q, strip.b, t + kVdpbf16Rows, strip.h));
  if (t >= p.keys || next == p.batch * p.heads) return;
  prefetch(token<bf16>(p.k, next / p.heads, t, next % p.heads));
  prefetch(token<bf16>(p.v, next / p.heads, t, next % p.heads));
}

// The probabilities of a strip and groups [first, first + groups) of keys.
template <bool kExact>
INTERNVIT_INLINE void block_probabilities(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s,
                                          const Strip& strip, int64_t first, int64_t groups) {
  const bool half = p.keys - (first + groups - 1) * kGroup <= 16;
  const int64_t rows = strip.rows > kTileRows ? kVdpbf16Rows : kTileRows;
  ScoreTile tile;
  tile.zero();
  TileRows to(p, s, 0, first, 0);
  to.there = 0;
  for (int64_t g = 0; g < groups - half; ++g) {
    prefetch_row(p, strip, first + g);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      tile = next_tile<kExact>(s, row, first + g, tile, to);
      to = TileRows(p, s, row, first + g, g);
    }
  }
  finish_tile<kExact>(tile, to);
  if (half) half_group<kExact>(p, s, first + groups - 1, groups - 1);
}

// Sums of the probabilities as rounded, and their product with V, over a block of keys.
template <int kRows>
INTERNVIT_INLINE void add_values(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s, int64_t first,
                                 int64_t groups) {
  __m512 sums[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) sums[i] = _mm512_load_ps(s.rounded_sums + i * kLanes);
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512i pairs = _mm512_load_si512(s.probabilities + i * kKeyBlock + g * kGroup);
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi16(0x3f80), (__m512bh)pairs);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) _mm512_store_ps(s.rounded_sums + i * kLanes, sums[i]);
  const int64_t keys = min_of(groups * kGroup, p.keys - first * kGroup);
  for (int64_t d = 0; d < s.depth; ++d) {
    float* out = s.out + d * kVdpbf16Rows * 32;
    const bf16* values = s.values + (d * s.groups + first) * 2 * kTile;
    Vdpbf16BlockOf<kRows> block;
    if (first == 0) {
      block.zero();
    } else {
      block.load_from(out, 32);
    }
    for (int64_t n = 0; n < keys; n += kGroup) {
      const bf16* v = values + n / kGroup * 2 * kTile;
      block.template add<kKeyBlock, 2, 32>(s.probabilities + n, v, v + kTile, (min_of(kGroup, keys - n) + 1) / 2);
    }
    block.store_to(out, 32);
  }
}

template <bool kExact>
void attention_pass_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s, const Strip& strip) {
  __builtin_memset(s.sums, 0, sizeof(float) * kVdpbf16Rows * kLanes);
  __builtin_memset(s.rounded_sums, 0, sizeof(float) * kVdpbf16Rows * kLanes);
  const int64_t blocks = (s.groups * kGroup + kKeyBlock - 1) / kKeyBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = s.groups * block / blocks, groups = s.groups * (block + 1) / blocks - first;
    block_probabilities<kExact>(p, s, strip, first, groups);
    if (strip.rows > kTileRows) {
      add_values<kVdpbf16Rows>(p, s, first, groups);
    } else {
      add_values<kTileRows>(p, s, first, groups);
    }
  }
}

// Each row's exact maximum of score * key_scale, into shift.
inline void exact_shift_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s) {
  Vec top[kVdpbf16Rows];
  for (Vec& t : top) t = broadcast(-__builtin_inff());
  for (int64_t g = 0; g < s.groups; ++g) {
    const bf16* keys = s.keys + g * 2 * s.depth * kTile;
    Vdpbf16Block block;
    block.zero();
    for (int64_t d = 0; d < s.depth; ++d)
      block.add<kMaxHeadDim, 2, 32>(s.queries + d * 32, keys + d * kTile, keys + (s.depth + d) * kTile, 16);
    const uint32_t there = last_group_mask(p.keys, g);
    for (int half = 0; half < 2; ++half) {
      const Vec key_scale = load(s.key_scale + g * kGroup + half * 16);
      const __mmask16 lanes = __mmask16(there >> half * 16);
      for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
        const __m512 x = _mm512_mul_round_ps(block.acc[i][half], key_scale.v, 8);
        // NaN stays: max returns its second operand where either is NaN, and a NaN on the left is put back.
        const __m512 higher = _mm512_mask_max_ps(top[i].v, lanes, top[i].v, x);
        top[i] = {_mm512_mask_mov_ps(higher, _mm512_cmp_ps_mask(top[i].v, top[i].v, _CMP_UNORD_Q), top[i].v)};
      }
    }
  }
  for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
    const bool nan = _mm512_cmp_ps_mask(top[i].v, top[i].v, _CMP_UNORD_Q);
    s.shift[i] = nan ? __builtin_nanf("") : max_lane(top[i]);
  }
}

// The sums of 12 rows of 16 lanes, a lane each.
INTERNVIT_INLINE Vec row_totals(const float* rows) {
  __m512i r[16] = {};
  for (int i = 0; i < kVdpbf16Rows; ++i) r[i] = _mm512_load_si512(rows + i * kLanes);
  transpose_words(r);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i)
      r[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(r[i]), _mm512_castsi512_ps(r[i + width])));
  return {_mm512_castsi512_ps(r[0])};
}

// The natural logarithm of x * 2^exponent, to an ulp; x is positive or NaN.
INTERNVIT_INLINE Vec log_of(Vec x, Vec exponent) {
  const __m512 m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const __mmask16 under_one = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.0f), _CMP_LT_OQ);
  const __m512 e = _mm512_getexp_ps(x.v);
  const Vec n = exponent + Vec{_mm512_mask_add_ps(e, under_one, e, _mm512_set1_ps(1.0f))};
  const Vec f = Vec{m} - broadcast(1.0f);
  Vec p = fma(broadcast(0.0535719916f), f, broadcast(-0.119686432f));
  p = fma(p, f, broadcast(0.149208143f));
  p = fma(p, f, broadcast(-0.168128386f));
  p = fma(p, f, broadcast(0.199828163f));
  p = fma(p, f, broadcast(-0.249953851f));
  p = fma(p, f, broadcast(0.333334506f));
  p = fma(p, f, broadcast(-0.5f));
  return fma(n, broadcast(kLn2), fma(p, f * f, f));
}

// q' of a strip and the shift of each row; whether the bounds are small enough to be used.
inline bool attention_queries_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s,
                                         const Strip& strip, float largest_key) {
  for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
    bf16* query = s.queries + i * kMaxHeadDim;
    Vec squares = broadcast(0.0f);
    if (i < strip.rows) {
      squares = fold_query(p, strip.b, strip.h, strip.first + i, s.depth, query, 32);
    } else {
      no_query(s.depth, query, 32);
    }
    store(s.sums + i * kLanes, squares);
  }
  const Vec norm = {_mm512_sqrt_ps(row_totals(s.sums).v)};
  const Vec bound = norm * broadcast(1 / kShrink) * broadcast(largest_key * 1.01f);
  store(s.shift, max(bound - broadcast(kHeadroom), broadcast(kLeastShift)));
  const __mmask16 rows = lane_mask(strip.rows);
  return _mm512_mask_cmp_ps_mask(rows, bound.v, _mm512_set1_ps(kLargestBound), _CMP_LT_OQ) == rows;
}

inline void attention_strip_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s,
                                       const Strip& strip, float largest_key) {
  const __mmask16 rows = lane_mask(strip.rows);
  bool good = attention_queries_avx512bf16(p, s, strip, largest_key);
  if (good) {
    attention_pass_avx512bf16<false>(p, s, strip);
    good = _mm512_mask_cmp_ps_mask(rows, row_totals(s.sums).v, _mm512_set1_ps(kLeastSum), _CMP_GT_OQ) == rows;
  }
  if (!good) {
    exact_shift_avx512bf16(p, s);
    attention_pass_avx512bf16<true>(p, s, strip);
  }
  store(p.lse + (strip.b * p.heads + strip.h) * p.row_stride + strip.first, log_of(row_totals(s.sums), load(s.shift)),
        strip.rows);
  store(s.inverse, broadcast(1.0f) / row_totals(s.rounded_sums));
  for (int64_t i = 0; i < strip.rows; ++i) {
    const Vec inverse = broadcast(s.inverse[i]);
    bf16* out = static_cast<bf16*>(p.out) + ((strip.b * p.tokens + strip.first + i) * p.heads + strip.h) * p.head_dim;
    for (int64_t d = 0; d < s.depth; ++d) {
      const float* accumulators = s.out + (d * kVdpbf16Rows + i) * 32;
      const __m512i pair = narrow_pair(load(accumulators) * inverse, load(accumulators + 16) * inverse);
      _mm512_mask_storeu_epi16(out + d * 32, half_mask(p.head_dim - d * 32), pair);
    }
  }
}

void attention_avx512bf16(const AttentionParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16 || p.head_dim > kMaxHeadDim) return attention(p, executor);
  const int64_t bytes = AttentionAvx512Bf16Scratch(ScratchArena{nullptr}, p.keys, p.head_dim).bytes;
  for_images<kVdpbf16Rows>(
      p, executor, bytes, [](const AttentionParams& image, void* memory, int64_t begin, int64_t end) {
        if (image.keys == 0) return attention_without_keys<bf16>(image, kVdpbf16Rows, begin, end);
        const AttentionAvx512Bf16Scratch s(ScratchArena{static_cast<char*>(memory)}, image.keys, image.head_dim);
        float largest_key = 0;
        for_strips<kVdpbf16Rows>(
            begin, end, image.heads, image.tokens,
            [&](int64_t b, int64_t h) { largest_key = pack_head(image, s, b, h); },
            [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
              attention_strip_avx512bf16(image, s, {b, h, first, rows}, largest_key);
            });
      });
}

}  // namespace internvit::INTERNVIT_ISA
