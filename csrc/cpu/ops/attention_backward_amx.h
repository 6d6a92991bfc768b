// The backward of attention for bf16 with AMX tiles, on what attention_backward_bf16.h describes: blocks of 128 keys,
// strips of 256 queries.
//
//   dv^T = dO^T P,  dk^T = q^T dT,  dq = dT k
//
// Transposed, dv and dk take P and dT as right operands, pairs of queries side by side, and dq takes dT as left
// operand, a row a query: the vector unit stores both forms as it goes, and nothing is transposed between the products.
// While it makes P and dT of 32 queries and 32 keys, the tile unit computes S and dP of the next 32 keys.
#pragma once

#include "cpu/ops/attention_amx.h"
#include "cpu/ops/attention_backward_bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kBlockGroups = 4, kStripGroups = 8;  // 32 keys and 32 queries each
constexpr int64_t kSums = 256;                         // floats of an accumulator

struct AttentionBackwardAmxScratch {
  bf16 *queries, *grads;               // q' and dO: A tiles [N / 32][D / 32][2]
  bf16 *query_columns, *grad_columns;  // q^T and dO^T: A tiles [D / 16][N / 32]
  float* grad_queries;                 // accumulators [N / 32][D / 16][2 rows]
  QueryTerms terms;
  bf16 *keys, *values;  // of a block, as PackedHead's keys
  bf16* key_rows;       // k with keys as its depth: B tiles [D / 16][4]
  KeyTerms key_terms;
  float *grad_keys, *grad_values;     // transposed: accumulators [D / 16][8]
  float *scores[2], *grad_scores[2];  // S and dP, [32 queries][32 keys]
  bf16 *p_pairs, *t_pairs;            // P and dT: B tiles [8 of 16 keys][8]
  bf16* t_rows;                       // dT: A tiles [8][4][2]
  float* rows;                        // [16][D]
  int64_t groups, depth, dims, bytes;
  AttentionBackwardAmxScratch(ScratchArena arena, int64_t tokens, int64_t head_dim) {
    groups = (tokens + kGroup - 1) / kGroup;
    depth = (head_dim + 31) / 32;
    dims = depth * 32;
    bf16** by_query[] = {&queries, &grads, &query_columns, &grad_columns};
    for (bf16** p : by_query) *p = arena.take<bf16>(groups * depth * 2 * kTile);
    grad_queries = arena.take<float>(groups * depth * 4 * kSums);
    const int64_t n = groups * kGroup, block = kBlockGroups * kGroup;
    terms = {arena.take<float>(n), arena.take<float>(n), arena.take<float>(n)};
    bf16** by_key[] = {&keys, &values, &key_rows};
    for (bf16** p : by_key) *p = arena.take<bf16>(kBlockGroups * depth * 2 * kTile);
    key_terms = {arena.take<float>(block), arena.take<float>(block)};
    grad_keys = arena.take<float>(depth * 2 * 2 * kBlockGroups * kSums);
    grad_values = arena.take<float>(depth * 2 * 2 * kBlockGroups * kSums);
    for (int i = 0; i < 2; ++i) {
      scores[i] = arena.take<float>(kGroup * kGroup);
      grad_scores[i] = arena.take<float>(kGroup * kGroup);
    }
    bf16** by_score[] = {&p_pairs, &t_pairs, &t_rows};
    for (bf16** p : by_score) *p = arena.take<bf16>(kStripGroups * kBlockGroups * 2 * kTile);
    rows = arena.take<float>(16 * dims);
    bytes = arena.used;
  }
};

// Two by two accumulators over `steps` of depth: distances in elements between the two rows or columns, and the steps.
struct Operand {
  const bf16* data;
  int64_t other, step;
};
struct Accumulators {
  float* data;
  int64_t row, column;

  INTERNVIT_INLINE void load_all() const {
    _tile_loadd(0, data, 64);
    _tile_loadd(1, data + column, 64);
    _tile_loadd(2, data + row, 64);
    _tile_loadd(3, data + row + column, 64);
  }
  INTERNVIT_INLINE void store_all() const {
    _tile_stored(0, data, 64);
    _tile_stored(1, data + column, 64);
    _tile_stored(2, data + row, 64);
    _tile_stored(3, data + row + column, 64);
  }
};

INTERNVIT_INLINE void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

INTERNVIT_INLINE void multiply_tiles(const Operand& a, const Operand& b, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a.data + i * a.step, 64);
    _tile_loadd(6, b.data + i * b.step, 64);
    _tile_loadd(7, b.data + b.other + i * b.step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.data + a.other + i * a.step, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

INTERNVIT_INLINE void add_product(const Operand& a, const Operand& b, int64_t steps, const Accumulators& c,
                                  bool first) {
  if (first) {
    zero_accumulators();
  } else {
    c.load_all();
  }
  multiply_tiles(a, b, steps);
  c.store_all();
}

// Up to 32 rows of up to 16 elements as an A tile of their transpose.
INTERNVIT_INLINE void pack_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t cols, bf16* tile) {
  pack_depth(x, stride, rows, cols, tile);
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + i * 32);
  transpose_words(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, r[i]);
}

INTERNVIT_INLINE void pack_queries(const AttentionBackwardParams& p, const AttentionBackwardAmxScratch& s, int64_t b,
                                   int64_t h) {
  for (int64_t n = 0; n < s.groups * kGroup; ++n) {
    const int64_t place = n / kGroup * s.depth * 2 * kTile + n / 16 % 2 * kTile + n % 16 * 32;
    pack_query(p, s.terms, b, h, n, s.depth, s.queries + place, s.grads + place, 2 * kTile);
  }
  for (int64_t d = 0; d < s.depth * 2; ++d) {
    const int64_t cols = p.head_dim - d * 16, column = cols > 0 ? d * 16 : 0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t n = g * kGroup, place = (d * s.groups + g) * kTile;
      const bf16 *q = token<bf16>(p.q, b, n, h) + column, *grad_out = token<bf16>(p.grad_out, b, n, h) + column;
      pack_transposed(q, p.q.stride_n, p.tokens - n, cols, s.query_columns + place);
      pack_transposed(grad_out, p.grad_out.stride_n, p.tokens - n, cols, s.grad_columns + place);
    }
  }
}

INTERNVIT_INLINE void pack_keys(const AttentionBackwardParams& p, const AttentionBackwardAmxScratch& s, int64_t b,
                                int64_t h, int64_t first, int64_t there, int64_t groups) {
  for (int64_t i = 0; i < groups * 2; ++i) {
    const int64_t rows = there - i * 16, n = first + (rows > 0 ? i * 16 : 0);
    for (int64_t d = 0; d < s.depth; ++d) {
      const bf16 *k = token<bf16>(p.k, b, n, h) + d * 32, *v = token<bf16>(p.v, b, n, h) + d * 32;
      const int64_t place = (i * s.depth + d) * kTile;
      pack_columns(k, p.k.stride_n, rows, p.head_dim - d * 32, s.keys + place);
      pack_columns(v, p.v.stride_n, rows, p.head_dim - d * 32, s.values + place);
    }
  }
  for (int64_t d = 0; d < s.depth * 2; ++d) {
    const int64_t cols = p.head_dim - d * 16, column = cols > 0 ? d * 16 : 0;
    for (int64_t g = 0; g < groups; ++g)
      pack_depth(token<bf16>(p.k, b, first + g * kGroup, h) + column, p.k.stride_n, there - g * kGroup, cols,
                 s.key_rows + (d * kBlockGroups + g) * kTile);
  }
  set_key_terms(p, s.key_terms, b, first, there, groups * kGroup);
}

// S and dP of one group of queries and one of keys, in 2 D / 32 steps of four products.
INTERNVIT_INLINE void score_step(const AttentionBackwardAmxScratch& s, int64_t query_group, int64_t group, int64_t step,
                                 int64_t buffer) {
  const bool second = step >= s.depth;
  const int64_t d = second ? step - s.depth : step;
  if (d == 0) zero_accumulators();
  const bf16 *rows = second ? s.grads : s.queries, *columns = second ? s.values : s.keys;
  multiply_tiles({rows + (query_group * s.depth + d) * 2 * kTile, kTile, 0},
                 {columns + (group * 2 * s.depth + d) * kTile, s.depth * kTile, 0}, 1);
  if (d + 1 < s.depth) return;
  float* out = second ? s.grad_scores[buffer] : s.scores[buffer];
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 512, 128);
  _tile_stored(3, out + 528, 128);
}

// P and dT of two queries, 2 i and 2 i + 1 of the strip's group q, and the block's group g of keys.
INTERNVIT_INLINE void backward_row_pair(const AttentionBackwardAmxScratch& s, int64_t query_group, int64_t q, int64_t g,
                                        int64_t i, int64_t buffer, uint32_t there) {
  const Half key_scale = load_half(s.key_terms.scale + g * kGroup),
             key_factor = load_half(s.key_terms.factor + g * kGroup);
  __m512i p_rows[2], t_rows[2];
  for (int u = 0; u < 2; ++u) {
    const int64_t row = 2 * i + u, n = query_group * kGroup + row;
    const Half p = probabilities(load_half(s.scores[buffer] + row * kGroup), key_scale, s.terms.shift[n], there);
    const Half dp = load_half(s.grad_scores[buffer] + row * kGroup);
    const Half t = grad_scores(dp, p, key_factor, s.terms.delta[n], s.terms.factor[n]);
    p_rows[u] = narrow_pair(p.left, p.right);
    t_rows[u] = narrow_pair(t.left, t.right);
    _mm512_store_si512(s.t_rows + ((q * kBlockGroups + g) * 2 + row / 16) * kTile + row % 16 * 32, t_rows[u]);
  }
  const auto store_pairs = [&](bf16* pairs, const __m512i* rows) __attribute__((always_inline)) {
    bf16* out = pairs + (g * 2 * kStripGroups + q) * kTile + i * 32;
    __m512i low, high;
    interleave(rows[0], rows[1], &low, &high);
    _mm512_store_si512(out, low);
    _mm512_store_si512(out + kStripGroups * kTile, high);
  };
  store_pairs(s.p_pairs, p_rows);
  store_pairs(s.t_pairs, t_rows);
}

// P and dT of a strip and a block.
inline void backward_scores(const AttentionBackwardAmxScratch& s, int64_t first, int64_t strip, int64_t groups,
                            int64_t there) {
  const int64_t units = strip * groups, steps = 2 * s.depth;
  for (int64_t step = 0; step < steps; ++step) score_step(s, first, 0, step, 0);
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t q = unit / groups, g = unit % groups, next = unit + 1;
    const uint32_t mask = half_mask(there - g * kGroup);
    int64_t step = next < units ? 0 : steps;
    for (int64_t i = 0; i < 16; ++i) {
      for (; step * 16 < steps * (i + 1); ++step) score_step(s, first + next / groups, next % groups, step, next & 1);
      backward_row_pair(s, first + q, q, g, i, unit & 1, mask);
    }
  }
}

inline void backward_block(const AttentionBackwardAmxScratch& s, int64_t groups, int64_t there, bool first_block) {
  for (int64_t first = 0; first < s.groups; first += kStripGroups) {
    const int64_t strip = min_of(kStripGroups, s.groups - first);
    backward_scores(s, first, strip, groups, there);
    for (int64_t d = 0; d < s.depth * 2; d += 2) {
      const int64_t columns = (d * s.groups + first) * kTile;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t pairs = g * 2 * kStripGroups * kTile, sums = (d * kBlockGroups + g) * 2 * kSums;
        const auto by_key = [&](const bf16* a, const bf16* b, float* c) __attribute__((always_inline)) {
          add_product({a + columns, s.groups * kTile, kTile}, {b + pairs, kStripGroups * kTile, kTile}, strip,
                      {c + sums, kBlockGroups * 2 * kSums, kSums}, first == 0);
        };
        by_key(s.grad_columns, s.p_pairs, s.grad_values);
        by_key(s.query_columns, s.t_pairs, s.grad_keys);
      }
      for (int64_t q = 0; q < strip; ++q)
        add_product({s.t_rows + q * kBlockGroups * 2 * kTile, kTile, 2 * kTile},
                    {s.key_rows + d * kBlockGroups * kTile, kBlockGroups * kTile, kTile}, groups,
                    {s.grad_queries + ((first + q) * s.depth * 2 + d) * 2 * kSums, kSums, 2 * kSums}, first_block);
    }
  }
}

// Sixteen keys' sums as rows.
INTERNVIT_INLINE void untranspose(const AttentionBackwardAmxScratch& s, const float* sums, int64_t tile) {
  for (int64_t d = 0; d < s.depth * 2; ++d) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + (d * 2 * kBlockGroups + tile) * kSums + i * 16);
    transpose_words(r);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(s.rows + i * s.dims + d * 16, r[i]);
  }
}

inline void attention_backward_head_amx(const AttentionBackwardParams& p, const AttentionBackwardAmxScratch& s,
                                        int64_t b, int64_t h) {
  const HeadGrads grads(p, b, h);
  pack_queries(p, s, b, h);
  for (int64_t first = 0; first < p.keys; first += kBlockGroups * kGroup) {
    const int64_t there = min_of(kBlockGroups * kGroup, p.keys - first), groups = (there + kGroup - 1) / kGroup;
    pack_keys(p, s, b, h, first, there, groups);
    backward_block(s, groups, there, first == 0);
    for (int64_t n = 0; n < there; n += 16) {
      untranspose(s, s.grad_keys, n / 16);
      for (int64_t i = 0; i < min_of(16, there - n); ++i) grads.store_k(first + n + i, s.rows + i * s.dims);
      untranspose(s, s.grad_values, n / 16);
      for (int64_t i = 0; i < min_of(16, there - n); ++i) grads.store_v(first + n + i, s.rows + i * s.dims);
    }
  }
  for (int64_t n = 0; n < p.tokens; ++n) {
    const float* sums = s.grad_queries + n / kGroup * s.depth * 4 * kSums + n / 16 % 2 * kSums + n % 16 * 16;
    for (int64_t d = 0; d < s.depth * 2; ++d) store(s.rows + d * 16, load(sums + d * 2 * kSums));
    grads.store_q(n, s.rows);
  }
}

void attention_backward_amx(const AttentionBackwardParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16) return attention_backward(p, executor);
  const int64_t bytes = AttentionBackwardAmxScratch(ScratchArena{nullptr}, p.tokens, p.head_dim).bytes;
  const int64_t float32_bytes = AttentionBackwardScratch(nullptr, p.keys, p.head_dim).bytes;
  const auto run = [](const AttentionBackwardParams& image, void* memory, int64_t begin, int64_t end) {
    const AttentionBackwardAmxScratch s(ScratchArena{static_cast<char*>(memory)}, image.tokens, image.head_dim);
    const AttentionBackwardScratch float32(memory, image.keys, image.head_dim);
    const TileScope tiles;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / image.heads, h = unit % image.heads;
      if (lse_gives_probabilities(image, b, h)) {
        attention_backward_head_amx(image, s, b, h);
      } else {
        attention_backward_head<bf16>(image, float32, b, h);
      }
    }
  };
  for_images<0>(p, executor, bytes > float32_bytes ? bytes : float32_bytes, run);
}

}  // namespace internvit::INTERNVIT_ISA
