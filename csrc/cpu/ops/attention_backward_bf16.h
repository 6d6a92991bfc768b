// What the backward of bf16 attention on AMX tiles and on VDPBF16PS share: the terms of queries and keys, P and dT, and
// the gradients' last steps.
//
//   P = exp2(q' k^T * key_scale - lse * log2(e)) as in forward,  dP = dO v^T,  delta = sum_d dO * out
//   dT = P * (dP - delta) * scale * rstd_q[i] * rstd_k[j],  rounded once, as P is
//   dv = P^T dO,  dq = (dT k) * q_weight * k_weight,  dk = (dT^T q) * q_weight * k_weight
//
// With both statistics in dT, the operands of the last two products are q and k as they are stored. A unit of work is a
// head: blocks of keys hold their dk and dv while strips of queries pass by; dq is summed over the blocks in order.
#pragma once

#include "cpu/ops/attention_backward.h"
#include "cpu/ops/attention_bf16.h"

namespace internvit::INTERNVIT_ISA {

// In a head with a larger |lse| the rounding of lse to float32 would show in P: such a head runs in float32 arithmetic,
// as does one without keys, whose lse is -inf, or without queries.
constexpr float kLargestLse = 2048.0f;

INTERNVIT_INLINE bool lse_gives_probabilities(const AttentionBackwardParams& p, int64_t b, int64_t h) {
  const float* lse = p.lse + (b * p.heads + h) * p.row_stride;
  bool small = p.tokens > 0;
  for (int64_t n = 0; n < p.tokens; ++n) small &= __builtin_fabsf(lse[n]) <= kLargestLse;  // false for NaN
  return small;
}

struct QueryTerms {
  float *shift, *delta, *factor;  // [N]: lse * log2(e), delta, scale * rstd_q
};

struct KeyTerms {
  float *scale, *factor;  // of a block: P's key_scale, rstd_k
};

// The terms of token n, and its q' and dO, 32 elements at `query` and `grad` + d * step each. Past the end P is 0.
INTERNVIT_INLINE void pack_query(const AttentionBackwardParams& p, const QueryTerms& terms, int64_t b, int64_t h,
                                 int64_t n, int64_t depth, bf16* query, bf16* grad, int64_t step) {
  if (n >= p.tokens) {
    no_query(depth, query, step);
    no_query(depth, grad, step);
    terms.shift[n] = 1e4f;
    terms.delta[n] = terms.factor[n] = 0;
    return;
  }
  fold_query(p, b, h, n, depth, query, step);
  const bf16 *grad_out = token<bf16>(p.grad_out, b, n, h), *out = token<bf16>(p.out, b, n, h);
  Vec delta = broadcast(0.0f);
  for (int64_t d = 0; d < depth; ++d) {
    const __mmask32 mask = half_mask(p.head_dim - d * 32);
    const __m512i g = _mm512_maskz_loadu_epi16(mask, grad_out + d * 32);
    _mm512_store_si512(grad + d * step, g);
    const __m512i o = _mm512_maskz_loadu_epi16(mask, out + d * 32);
    delta = fma({widen(_mm512_castsi512_si256(g))}, {widen(_mm512_castsi512_si256(o))}, delta);
    delta = fma({widen(_mm512_extracti64x4_epi64(g, 1))}, {widen(_mm512_extracti64x4_epi64(o, 1))}, delta);
  }
  terms.delta[n] = sum(delta);
  terms.shift[n] = p.lse[(b * p.heads + h) * p.row_stride + n] * kLog2E;
  terms.factor[n] = p.q_weight ? p.scale * p.rstd_q[b * p.tokens + n] : p.scale;
}

INTERNVIT_INLINE void set_key_terms(const AttentionBackwardParams& p, const KeyTerms& terms, int64_t b, int64_t first,
                                    int64_t there, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    const float rstd = p.q_weight && n < there ? p.rstd_k[b * p.keys + first + n] : 1.0f;
    terms.scale[n] = p.q_weight ? rstd : p.scale * kLog2E;
    terms.factor[n] = rstd;
  }
}

// One query and 32 keys, of which the bits of `there` say which exist.
struct Half {
  Vec left, right;
};

INTERNVIT_INLINE Half probabilities(Half scores, const Half& key_scale, float shift, uint32_t there) {
  const Vec left = probability<false>(scores.left, key_scale.left, broadcast(shift));
  const Vec right = probability<false>(scores.right, key_scale.right, broadcast(shift));
  return {{_mm512_maskz_mov_ps(__mmask16(there), left.v)}, {_mm512_maskz_mov_ps(__mmask16(there >> 16), right.v)}};
}

INTERNVIT_INLINE Half grad_scores(Half dp, Half p, const Half& key_factor, float delta, float factor) {
  const Vec d = broadcast(delta), f = broadcast(factor);
  return {(dp.left - d) * p.left * (key_factor.left * f), (dp.right - d) * p.right * (key_factor.right * f)};
}

INTERNVIT_INLINE Half load_half(const float* x) { return {load(x), load(x + 16)}; }
INTERNVIT_INLINE void store_half(float* x, Half h) {
  store(x, h.left);
  store(x + 16, h.right);
}

// One token's gradient from its sums, which it overwrites; with QK-norm also the weight's, and the row dot.
INTERNVIT_INLINE void store_unscaled_grad(float* sums, const bf16* x, const float* weight, const float* other_weight,
                                          int64_t head_dim, bf16* grad, float* grad_weight, float* row_dot) {
  if (!weight) return store_grad(sums, head_dim, grad);
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) {
    store(sums + d, load(sums + d, lanes) * load(other_weight + d, lanes), lanes);
  });
  *row_dot = store_normed_grad(sums, x, weight, 1.0f, head_dim, grad, grad_weight);
}

// What a head's gradients end in.
struct HeadGrads {
  const AttentionBackwardParams& p;
  int64_t b, h;
  const float *q_weight = nullptr, *k_weight = nullptr;
  float *grad_q_weight = nullptr, *grad_k_weight = nullptr;

  HeadGrads(const AttentionBackwardParams& params, int64_t image, int64_t head) : p(params), b(image), h(head) {
    if (!p.q_weight) return;
    const int64_t d = p.head_dim, weights = (b * p.heads + h) * d;
    q_weight = p.q_weight + h * d, k_weight = p.k_weight + h * d;
    grad_q_weight = p.grad_q_weight_partial + weights, grad_k_weight = p.grad_k_weight_partial + weights;
    __builtin_memset(grad_q_weight, 0, uint64_t(d) * sizeof(float));
    __builtin_memset(grad_k_weight, 0, uint64_t(d) * sizeof(float));
  }
  INTERNVIT_INLINE void store_q(int64_t n, float* sums) const {
    store_unscaled_grad(sums, token<bf16>(p.q, b, n, h), q_weight, k_weight, p.head_dim,
                        writable<bf16>(p.grad_q, b, n, h), grad_q_weight,
                        p.row_dot_q + (b * p.heads + h) * p.row_stride + n);
  }
  INTERNVIT_INLINE void store_k(int64_t n, float* sums) const {
    store_unscaled_grad(sums, token<bf16>(p.k, b, n, h), k_weight, q_weight, p.head_dim,
                        writable<bf16>(p.grad_k, b, n, h), grad_k_weight,
                        p.row_dot_k + (b * p.heads + h) * p.row_stride + n);
  }
  INTERNVIT_INLINE void store_v(int64_t n, const float* sums) const {
    store_grad(sums, p.head_dim, writable<bf16>(p.grad_v, b, n, h));
  }
};

}  // namespace internvit::INTERNVIT_ISA
