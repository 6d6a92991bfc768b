// The backward of attention for bf16 with VDPBF16PS.
//
//   P = exp2(q' k^T * key_scale - lse * log2(e)) as in forward,  dP = dO v^T,  delta = sum_d dO * out
//   dT = P * (dP - delta) * scale * rstd_q[i] * rstd_k[j],  rounded once, as P is
//   dv = P^T dO,  dq = (dT k) * q_weight * k_weight,  dk = (dT^T q) * q_weight * k_weight
//
// With both statistics in dT, the operands of the last two products are q and k as they are stored. A unit of work is a
// head. Blocks of 96 keys hold their dk and dv while strips of 48 queries pass by; dq is summed over the blocks in order.
namespace internvit::INTERNVIT_ISA {

constexpr int64_t kBackKeys = 96, kBackQueries = 48;

struct AttentionBackwardDotScratch {
  bf16 *queries, *grads;           // q' and dO, [N][128]
  bf16 *query_pairs, *grad_pairs;  // q and dO, [D / 32][N / 2][2][16][2]
  float* grad_queries;             // [N][D]
  float *shift, *delta, *factor;   // [N]: lse * log2(e), delta, scale * rstd_q
  bf16 *keys, *values;             // of a block: B tiles [group][2][D / 32] whose columns are the keys
  bf16* key_pairs;                 // [D / 32][48][2][16][2]
  float *key_scale, *key_factor;   // [96]
  float *grad_keys, *grad_values;  // [96][D]
  float* probabilities;            // [12][32]
  bf16 *p_pairs, *t_pairs;         // P and dT, [24 pairs of queries][96 keys][2]
  bf16* t_rows;                    // dT, [48][96]
  float* row;                      // [D]
  int64_t tokens, pairs, depth, dims, bytes;
  AttentionBackwardDotScratch(Carve carve, int64_t n_tokens, int64_t head_dim) {
    tokens = round_up(n_tokens, kBackQueries);
    pairs = tokens / 2;
    depth = (head_dim + 31) / 32;
    dims = depth * 32;
    queries = carve.take<bf16>(tokens * kDotDim);
    grads = carve.take<bf16>(tokens * kDotDim);
    query_pairs = carve.take<bf16>(tokens * dims);
    grad_pairs = carve.take<bf16>(tokens * dims);
    grad_queries = carve.take<float>(tokens * dims);
    shift = carve.take<float>(tokens);
    delta = carve.take<float>(tokens);
    factor = carve.take<float>(tokens);
    keys = carve.take<bf16>(kBackKeys * dims);
    values = carve.take<bf16>(kBackKeys * dims);
    key_pairs = carve.take<bf16>(kBackKeys * dims);
    key_scale = carve.take<float>(kBackKeys);
    key_factor = carve.take<float>(kBackKeys);
    grad_keys = carve.take<float>(kBackKeys * dims);
    grad_values = carve.take<float>(kBackKeys * dims);
    probabilities = carve.take<float>(kDotRows * kGroup);
    p_pairs = carve.take<bf16>(kBackQueries * kBackKeys);
    t_pairs = carve.take<bf16>(kBackQueries * kBackKeys);
    t_rows = carve.take<bf16>(kBackQueries * kBackKeys);
    row = carve.take<float>(dims);
    bytes = carve.used;
  }
};

INTERNVIT_INLINE void pack_queries(const AttentionBackwardParams& p, const AttentionBackwardDotScratch& s, int64_t b,
                                   int64_t h) {
  for (int64_t n = 0; n < s.tokens; ++n) {
    bf16 *query = s.queries + n * kDotDim, *grad = s.grads + n * kDotDim;
    if (n >= p.tokens) {  // P is 0 there
      no_query(s.depth, query, 32);
      no_query(s.depth, grad, 32);
      s.shift[n] = 1e4f;
      s.delta[n] = s.factor[n] = 0;
      continue;
    }
    fold_query(p, b, h, n, s.depth, query, 32);
    const bf16 *grad_out = token<bf16>(p.grad_out, b, n, h), *out = token<bf16>(p.out, b, n, h);
    Vec delta = broadcast(0.0f);
    for (int64_t d = 0; d < s.depth; ++d) {
      const __mmask32 mask = half_mask(p.head_dim - d * 32);
      const __m512i g = _mm512_maskz_loadu_epi16(mask, grad_out + d * 32);
      _mm512_store_si512(grad + d * 32, g);
      const __m512i o = _mm512_maskz_loadu_epi16(mask, out + d * 32);
      delta = fma({widen(_mm512_castsi512_si256(g))}, {widen(_mm512_castsi512_si256(o))}, delta);
      delta = fma({widen(_mm512_extracti64x4_epi64(g, 1))}, {widen(_mm512_extracti64x4_epi64(o, 1))}, delta);
    }
    s.delta[n] = sum(delta);
    s.shift[n] = p.lse[(b * p.heads + h) * p.tokens + n] * kLog2E;
    s.factor[n] = p.q_weight ? p.scale * p.rstd_q[b * p.tokens + n] : p.scale;
  }
  for (int64_t d = 0; d < s.depth; ++d) {
    const int64_t columns = p.head_dim - d * 32, place = d * s.pairs * 64;
    pack_pairs(token<bf16>(p.q, b, 0, h) + d * 32, p.q.stride_n, p.tokens, columns, s.pairs, s.query_pairs + place);
    pack_pairs(token<bf16>(p.grad_out, b, 0, h) + d * 32, p.grad_out.stride_n, p.tokens, columns, s.pairs,
               s.grad_pairs + place);
  }
}

INTERNVIT_INLINE void pack_keys(const AttentionBackwardParams& p, const AttentionBackwardDotScratch& s, int64_t b,
                                int64_t h, int64_t first, int64_t there) {
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
  for (int64_t n = 0; n < kBackKeys; ++n) {
    const float rstd = p.q_weight && n < there ? p.rstd_k[b * p.tokens + first + n] : 1.0f;
    s.key_scale[n] = p.q_weight ? rstd : p.scale * kLog2E;
    s.key_factor[n] = rstd;
  }
}

// P and dT of 12 queries and one group of keys: `query` of all, `q` and `g` inside the strip and the block.
INTERNVIT_INLINE void backward_scores(const AttentionBackwardDotScratch& s, int64_t query, int64_t q, int64_t g,
                                      uint32_t there) {
  DotBlock block;
  const auto product = [&](const bf16* rows, const bf16* columns) __attribute__((always_inline)) {
    columns += g * 2 * s.depth * kTile;
    block.zero();
    for (int64_t d = 0; d < s.depth; ++d)
      block.add<kDotDim, 2, 32>(rows + query * kDotDim + d * 32, columns + d * kTile, columns + (s.depth + d) * kTile, 16);
  };
  const auto store_pairs = [&](bf16* pairs, int i, __m512i even, __m512i odd) __attribute__((always_inline)) {
    bf16* out = pairs + (((q + i) / 2) * kBackKeys + g * kGroup) * 2;
    __m512i low, high;
    interleave(even, odd, &low, &high);
    _mm512_store_si512(out, low);
    _mm512_store_si512(out + 32, high);
  };
  const Vec left_scale = load(s.key_scale + g * kGroup), right_scale = load(s.key_scale + g * kGroup + 16);
  product(s.queries, s.keys);
#pragma GCC unroll 6
  for (int i = 0; i < kDotRows; i += 2) {
    __m512i rows[2];
    for (int u = 0; u < 2; ++u) {
      const Vec shift = broadcast(s.shift[query + i + u]);
      Vec left = probability<false>({block.acc[i + u][0]}, left_scale, shift);
      Vec right = probability<false>({block.acc[i + u][1]}, right_scale, shift);
      left = {_mm512_maskz_mov_ps(__mmask16(there), left.v)};
      right = {_mm512_maskz_mov_ps(__mmask16(there >> 16), right.v)};
      store(s.probabilities + (i + u) * kGroup, left);
      store(s.probabilities + (i + u) * kGroup + 16, right);
      rows[u] = narrow_pair(left, right);
    }
    store_pairs(s.p_pairs, i, rows[0], rows[1]);
  }
  product(s.grads, s.values);
  const Vec left_factor = load(s.key_factor + g * kGroup), right_factor = load(s.key_factor + g * kGroup + 16);
#pragma GCC unroll 6
  for (int i = 0; i < kDotRows; i += 2) {
    __m512i rows[2];
    for (int u = 0; u < 2; ++u) {
      const Vec delta = broadcast(s.delta[query + i + u]), factor = broadcast(s.factor[query + i + u]);
      const float* probability = s.probabilities + (i + u) * kGroup;
      const Vec left = (Vec{block.acc[i + u][0]} - delta) * load(probability) * (left_factor * factor);
      const Vec right = (Vec{block.acc[i + u][1]} - delta) * load(probability + 16) * (right_factor * factor);
      rows[u] = narrow_pair(left, right);
      _mm512_store_si512(s.t_rows + (q + i + u) * kBackKeys + g * kGroup, rows[u]);
    }
    store_pairs(s.t_pairs, i, rows[0], rows[1]);
  }
}

// sums [12 keys][D] of one block += pairs^T x, over a strip of queries.
INTERNVIT_INLINE void add_by_key(const AttentionBackwardDotScratch& s, const bf16* pairs, const bf16* x, int64_t first,
                                 int64_t rows, int64_t key, float* sums) {
  for (int64_t d = 0; d < s.depth; ++d) {
    DotBlock block;
    float* c = sums + key * s.dims + d * 32;
    const bf16* columns = x + (d * s.pairs + first / 2) * 64;
    block.load_from(c, s.dims);
    block.add<2, kBackKeys * 2, 64>(pairs + key * 2, columns, columns + 32, (rows + 1) / 2);
    block.store_to(c, s.dims);
  }
}

inline void backward_block(const AttentionBackwardDotScratch& s, int64_t tokens, int64_t there) {
  const int64_t groups = (there + kGroup - 1) / kGroup;
  for (int64_t first = 0; first < tokens; first += kBackQueries) {
    const int64_t rows = min_of(kBackQueries, tokens - first);
    for (int64_t q = 0; q < rows; q += kDotRows)
      for (int64_t g = 0; g < groups; ++g) backward_scores(s, first + q, q, g, uint32_t(half_mask(there - g * kGroup)));
    for (int64_t key = 0; key < there; key += kDotRows) {
      add_by_key(s, s.p_pairs, s.grad_pairs, first, rows, key, s.grad_values);
      add_by_key(s, s.t_pairs, s.query_pairs, first, rows, key, s.grad_keys);
    }
    for (int64_t q = 0; q < rows; q += kDotRows) {
      for (int64_t d = 0; d < s.depth; ++d) {
        DotBlock block;
        float* c = s.grad_queries + (first + q) * s.dims + d * 32;
        const bf16* columns = s.key_pairs + d * kBackKeys * 32;
        block.load_from(c, s.dims);
        block.add<kBackKeys, 2, 64>(s.t_rows + q * kBackKeys, columns, columns + 32, (there + 1) / 2);
        block.store_to(c, s.dims);
      }
    }
  }
}

// One token's gradient from its sum; with QK-norm also the weight's, and the row dot.
INTERNVIT_INLINE void store_dot_grad(const AttentionBackwardDotScratch& s, const float* sums, const bf16* x,
                                     const float* weight, const float* other_weight, int64_t head_dim, bf16* grad,
                                     float* grad_weight, float* row_dot) {
  if (!weight) return store_grad(sums, head_dim, grad);
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) {
    store(s.row + d, load(sums + d, lanes) * load(other_weight + d, lanes), lanes);
  });
  *row_dot = store_normed_grad(s.row, x, weight, 1.0f, head_dim, grad, grad_weight);
}

inline void attention_backward_head_dot(const AttentionBackwardParams& p, const AttentionBackwardDotScratch& s,
                                        int64_t b, int64_t h) {
  const int64_t d = p.head_dim, dots = (b * p.heads + h) * p.tokens, weights = (b * p.heads + h) * d;
  const float *q_weight = nullptr, *k_weight = nullptr;
  float *grad_q_weight = nullptr, *grad_k_weight = nullptr;
  if (p.q_weight) {
    q_weight = p.q_weight + h * d, k_weight = p.k_weight + h * d;
    grad_q_weight = p.grad_q_weight_partial + weights, grad_k_weight = p.grad_k_weight_partial + weights;
    __builtin_memset(grad_q_weight, 0, uint64_t(d) * sizeof(float));
    __builtin_memset(grad_k_weight, 0, uint64_t(d) * sizeof(float));
  }
  pack_queries(p, s, b, h);
  __builtin_memset(s.grad_queries, 0, uint64_t(s.tokens * s.dims) * sizeof(float));
  for (int64_t first = 0; first < p.tokens; first += kBackKeys) {
    const int64_t there = min_of(kBackKeys, p.tokens - first);
    pack_keys(p, s, b, h, first, there);
    __builtin_memset(s.grad_keys, 0, uint64_t(kBackKeys * s.dims) * sizeof(float));
    __builtin_memset(s.grad_values, 0, uint64_t(kBackKeys * s.dims) * sizeof(float));
    backward_block(s, p.tokens, there);
    for (int64_t i = 0; i < there; ++i) {
      const int64_t n = first + i;
      store_dot_grad(s, s.grad_keys + i * s.dims, token<bf16>(p.k, b, n, h), k_weight, q_weight, d,
                     writable<bf16>(p.grad_k, b, n, h), grad_k_weight, p.row_dot_k + dots + n);
      store_grad(s.grad_values + i * s.dims, d, writable<bf16>(p.grad_v, b, n, h));
    }
  }
  for (int64_t n = 0; n < p.tokens; ++n)
    store_dot_grad(s, s.grad_queries + n * s.dims, token<bf16>(p.q, b, n, h), q_weight, k_weight, d,
                   writable<bf16>(p.grad_q, b, n, h), grad_q_weight, p.row_dot_q + dots + n);
}

void attention_backward_dot(const AttentionBackwardParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16 || p.head_dim > kDotDim) return attention_backward(p, executor);
  parallel(executor, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t bytes = AttentionBackwardDotScratch(Carve{nullptr}, p.tokens, p.head_dim).bytes;
    const AttentionBackwardDotScratch s(Carve{static_cast<char*>(executor.scratch(bytes))}, p.tokens, p.head_dim);
    for (int64_t unit = begin; unit < end; ++unit)
      attention_backward_head_dot(p, s, unit / p.heads, unit % p.heads);
  });
}

}  // namespace internvit::INTERNVIT_ISA
