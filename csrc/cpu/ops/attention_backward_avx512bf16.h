// The backward of attention for bf16 with VDPBF16PS, on what attention_backward_bf16.h describes: blocks of 96 keys,
// strips of 48 queries.
#pragma once

#include "cpu/ops/attention_avx512bf16.h"
#include "cpu/ops/attention_backward_bf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kBackKeys = 96, kBackQueries = 48;

struct AttentionBackwardAvx512Bf16Scratch {
  bf16 *queries, *grads;           // q' and dO, [N][128]
  bf16 *query_pairs, *grad_pairs;  // q and dO, [D / 32][N / 2][2][16][2]
  float* grad_queries;             // [N][D]
  QueryTerms terms;
  bf16 *keys, *values;  // of a block: B tiles [group][2][D / 32] whose columns are the keys
  bf16* key_pairs;      // [D / 32][48][2][16][2]
  KeyTerms key_terms;
  float *grad_keys, *grad_values;  // [96][D]
  float* probabilities;            // [12][32]
  bf16 *p_pairs, *t_pairs;         // P and dT, [24 pairs of queries][96 keys][2]
  bf16* t_rows;                    // dT, [48][96]
  int64_t tokens, pairs, depth, dims, bytes;
  AttentionBackwardAvx512Bf16Scratch(ScratchArena arena, int64_t n_tokens, int64_t head_dim) {
    tokens = round_up(n_tokens, kBackQueries);
    pairs = tokens / 2;
    depth = (head_dim + 31) / 32;
    dims = depth * 32;
    queries = arena.take<bf16>(tokens * kMaxHeadDim);
    grads = arena.take<bf16>(tokens * kMaxHeadDim);
    query_pairs = arena.take<bf16>(tokens * dims);
    grad_pairs = arena.take<bf16>(tokens * dims);
    grad_queries = arena.take<float>(tokens * dims);
    terms = {arena.take<float>(tokens), arena.take<float>(tokens), arena.take<float>(tokens)};
    keys = arena.take<bf16>(kBackKeys * dims);
    values = arena.take<bf16>(kBackKeys * dims);
    key_pairs = arena.take<bf16>(kBackKeys * dims);
    key_terms = {arena.take<float>(kBackKeys), arena.take<float>(kBackKeys)};
    grad_keys = arena.take<float>(kBackKeys * dims);
    grad_values = arena.take<float>(kBackKeys * dims);
    probabilities = arena.take<float>(kVdpbf16Rows * kGroup);
    p_pairs = arena.take<bf16>(kBackQueries * kBackKeys);
    t_pairs = arena.take<bf16>(kBackQueries * kBackKeys);
    t_rows = arena.take<bf16>(kBackQueries * kBackKeys);
    bytes = arena.used;
  }
};

INTERNVIT_INLINE void pack_queries(const AttentionBackwardParams& p, const AttentionBackwardAvx512Bf16Scratch& s,
                                   int64_t b, int64_t h) {
  for (int64_t n = 0; n < s.tokens; ++n)
    pack_query(p, s.terms, b, h, n, s.depth, s.queries + n * kMaxHeadDim, s.grads + n * kMaxHeadDim, 32);
  for (int64_t d = 0; d < s.depth; ++d) {
    const int64_t columns = p.head_dim - d * 32, place = d * s.pairs * 64;
    pack_pairs(token<bf16>(p.q, b, 0, h) + d * 32, p.q.stride_n, p.tokens, columns, s.pairs, s.query_pairs + place);
    pack_pairs(token<bf16>(p.grad_out, b, 0, h) + d * 32, p.grad_out.stride_n, p.tokens, columns, s.pairs,
               s.grad_pairs + place);
  }
}

INTERNVIT_INLINE void pack_keys(const AttentionBackwardParams& p, const AttentionBackwardAvx512Bf16Scratch& s,
                                int64_t b, int64_t h, int64_t first, int64_t there) {
  for (int64_t d = 0; d < s.depth; ++d) {
    const bf16 *k = token<bf16>(p.k, b, first, h) + d * 32, *v = token<bf16>(p.v, b, first, h) + d * 32;
    const int64_t columns = p.head_dim - d * 32;
    for (int64_t n = 0; n < kBackKeys; n += 16) {
      const int64_t place = (n / 16 * s.depth + d) * kTile, some = n < there ? n : 0;
      pack_columns(k + some * p.k.stride_n, p.k.stride_n, there - n, columns, s.keys + place);
      pack_columns(v + some * p.v.stride_n, p.v.stride_n, there - n, columns, s.values + place);
    }
    pack_pairs(k, p.k.stride_n, there, columns, kBackKeys / 2, s.key_pairs + d * kBackKeys * 32);
  }
  set_key_terms(p, s.key_terms, b, first, there, kBackKeys);
}

// P and dT of 12 queries and one group of keys: `query` of all, `q` and `g` inside the strip and the block.
INTERNVIT_INLINE void backward_scores(const AttentionBackwardAvx512Bf16Scratch& s, int64_t query, int64_t q, int64_t g,
                                      uint32_t there) {
  Vdpbf16Block block;
  const auto product = [&](const bf16* rows, const bf16* columns) __attribute__((always_inline)) {
    columns += g * 2 * s.depth * kTile;
    block.zero();
    for (int64_t d = 0; d < s.depth; ++d)
      block.add<kMaxHeadDim, 2, 32>(rows + query * kMaxHeadDim + d * 32, columns + d * kTile,
                                    columns + (s.depth + d) * kTile, 16);
  };
  const auto store_pairs = [&](bf16* pairs, int i, __m512i even, __m512i odd) __attribute__((always_inline)) {
    bf16* out = pairs + (((q + i) / 2) * kBackKeys + g * kGroup) * 2;
    __m512i low, high;
    interleave(even, odd, &low, &high);
    _mm512_store_si512(out, low);
    _mm512_store_si512(out + 32, high);
  };
  const Half key_scale = load_half(s.key_terms.scale + g * kGroup);
  product(s.queries, s.keys);
#pragma GCC unroll 6
  for (int i = 0; i < kVdpbf16Rows; i += 2) {
    __m512i rows[2];
    for (int u = 0; u < 2; ++u) {
      const Half scores = {{block.acc[i + u][0]}, {block.acc[i + u][1]}};
      const Half p = probabilities(scores, key_scale, s.terms.shift[query + i + u], there);
      store_half(s.probabilities + (i + u) * kGroup, p);
      rows[u] = narrow_pair(p.left, p.right);
    }
    store_pairs(s.p_pairs, i, rows[0], rows[1]);
  }
  product(s.grads, s.values);
  const Half key_factor = load_half(s.key_terms.factor + g * kGroup);
#pragma GCC unroll 6
  for (int i = 0; i < kVdpbf16Rows; i += 2) {
    __m512i rows[2];
    for (int u = 0; u < 2; ++u) {
      const int64_t n = query + i + u;
      const Half dp = {{block.acc[i + u][0]}, {block.acc[i + u][1]}}, p = load_half(s.probabilities + (i + u) * kGroup);
      const Half t = grad_scores(dp, p, key_factor, s.terms.delta[n], s.terms.factor[n]);
      rows[u] = narrow_pair(t.left, t.right);
      _mm512_store_si512(s.t_rows + (q + i + u) * kBackKeys + g * kGroup, rows[u]);
    }
    store_pairs(s.t_pairs, i, rows[0], rows[1]);
  }
}

// sums [12 keys][D] of one block += pairs^T x, over a strip of queries.
INTERNVIT_INLINE void add_by_key(const AttentionBackwardAvx512Bf16Scratch& s, const bf16* pairs, const bf16* x,
                                 int64_t first, int64_t rows, int64_t key, float* sums) {
  for (int64_t d = 0; d < s.depth; ++d) {
    Vdpbf16Block block;
    float* c = sums + key * s.dims + d * 32;
    const bf16* columns = x + (d * s.pairs + first / 2) * 64;
    block.load_from(c, s.dims);
    block.add<2, kBackKeys * 2, 64>(pairs + key * 2, columns, columns + 32, (rows + 1) / 2);
    block.store_to(c, s.dims);
  }
}

inline void backward_block(const AttentionBackwardAvx512Bf16Scratch& s, int64_t tokens, int64_t there) {
  const int64_t groups = (there + kGroup - 1) / kGroup;
  for (int64_t first = 0; first < tokens; first += kBackQueries) {
    const int64_t rows = min_of(kBackQueries, tokens - first);
    for (int64_t q = 0; q < rows; q += kVdpbf16Rows)
      for (int64_t g = 0; g < groups; ++g) backward_scores(s, first + q, q, g, uint32_t(half_mask(there - g * kGroup)));
    for (int64_t key = 0; key < there; key += kVdpbf16Rows) {
      add_by_key(s, s.p_pairs, s.grad_pairs, first, rows, key, s.grad_values);
      add_by_key(s, s.t_pairs, s.query_pairs, first, rows, key, s.grad_keys);
    }
    for (int64_t q = 0; q < rows; q += kVdpbf16Rows) {
      for (int64_t d = 0; d < s.depth; ++d) {
        Vdpbf16Block block;
        float* c = s.grad_queries + (first + q) * s.dims + d * 32;
        const bf16* columns = s.key_pairs + d * kBackKeys * 32;
        block.load_from(c, s.dims);
        block.add<kBackKeys, 2, 64>(s.t_rows + q * kBackKeys, columns, columns + 32, (there + 1) / 2);
        block.store_to(c, s.dims);
      }
    }
  }
}

inline void attention_backward_head_avx512bf16(const AttentionBackwardParams& p,
                                               const AttentionBackwardAvx512Bf16Scratch& s, int64_t b, int64_t h) {
  const HeadGrads grads(p, b, h);
  pack_queries(p, s, b, h);
  __builtin_memset(s.grad_queries, 0, uint64_t(s.tokens * s.dims) * sizeof(float));
  for (int64_t first = 0; first < p.keys; first += kBackKeys) {
    const int64_t there = min_of(kBackKeys, p.keys - first);
    pack_keys(p, s, b, h, first, there);
    __builtin_memset(s.grad_keys, 0, uint64_t(kBackKeys * s.dims) * sizeof(float));
    __builtin_memset(s.grad_values, 0, uint64_t(kBackKeys * s.dims) * sizeof(float));
    backward_block(s, p.tokens, there);
    for (int64_t i = 0; i < there; ++i) {
      grads.store_k(first + i, s.grad_keys + i * s.dims);
      grads.store_v(first + i, s.grad_values + i * s.dims);
    }
  }
  for (int64_t n = 0; n < p.tokens; ++n) grads.store_q(n, s.grad_queries + n * s.dims);
}

void attention_backward_avx512bf16(const AttentionBackwardParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16 || p.head_dim > kMaxHeadDim) return attention_backward(p, executor);
  const int64_t bytes = AttentionBackwardAvx512Bf16Scratch(ScratchArena{nullptr}, p.tokens, p.head_dim).bytes;
  const int64_t float32_bytes = AttentionBackwardScratch(nullptr, p.keys, p.head_dim).bytes;
  const auto run = [](const AttentionBackwardParams& image, void* memory, int64_t begin, int64_t end) {
    const AttentionBackwardAvx512Bf16Scratch s(ScratchArena{static_cast<char*>(memory)}, image.tokens, image.head_dim);
    const AttentionBackwardScratch float32(memory, image.keys, image.head_dim);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / image.heads, h = unit % image.heads;
      if (lse_gives_probabilities(image, b, h)) {
        attention_backward_head_avx512bf16(image, s, b, h);
      } else {
        attention_backward_head<bf16>(image, float32, b, h);
      }
    }
  };
  for_images<0>(p, executor, bytes > float32_bytes ? bytes : float32_bytes, run);
}

}  // namespace internvit::INTERNVIT_ISA
