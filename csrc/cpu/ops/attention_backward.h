// The backward of attention in float32 arithmetic, for every dtype and instruction set.
//
//   P = softmax(S), S = q_hat k_hat^T scale;  dP = dO v^T,  dS = P * (dP - delta) * scale,  delta = sum_j P dP
//   dv = P^T dO,  dq_hat = dS k_hat,  dk_hat = dS^T q_hat
//   dq = dq_hat * rstd_q * q_weight,  dq_weight = sum_n dq_hat * rstd_q * q,  row_dot_q = sum_d dq_hat * q_hat
//   and alike for k
//
// P and delta come from the scores themselves, which a strip has in cache, and not from lse and out: exp(S - lse)
// carries the rounding of lse, 1e-3 where scores are 1e4, and any factor, infinity included, where they are 1e9.
//
// A unit of work is a head: its strips of queries add to dk and dv in order, so the bits do not depend on the threads.
#pragma once

#include "cpu/ops/attention.h"

namespace internvit::INTERNVIT_ISA {

struct AttentionBackwardScratch {
  float *k_transposed, *v_transposed, *keys, *grad_keys, *grad_values;  // panels of [D, N], [N, D]
  float *queries, *grads, *probabilities, *grad_scores, *grad_queries;  // [strip, D], [strip, N]
  float *row, *weight_sum;                                              // [D]
  int64_t columns, dims, bytes;
  AttentionBackwardScratch(void* memory, int64_t n_keys, int64_t head_dim) {
    columns = round_up(n_keys, kLanes);
    dims = round_up(head_dim, kLanes);
    ScratchArena arena{static_cast<char*>(memory)};
    float** by_column[] = {&k_transposed, &v_transposed};
    for (float** p : by_column) *p = arena.take<float>(round_up(columns, kPanelColumns) * dims);
    float** by_token[] = {&keys, &grad_keys, &grad_values};
    for (float** p : by_token) *p = arena.take<float>(columns * dims);
    float** by_query[] = {&queries, &grads, &grad_queries};
    for (float** p : by_query) *p = arena.take<float>(kStrip * dims);
    float** by_score[] = {&probabilities, &grad_scores};
    for (float** p : by_score) *p = arena.take<float>(kStrip * columns);
    row = arena.take<float>(dims);
    weight_sum = arena.take<float>(dims);
    bytes = arena.used;
  }
};

template <class T>
INTERNVIT_INLINE T* writable(const HeadsView& x, int64_t b, int64_t n, int64_t h) {
  return const_cast<T*>(token<T>(x, b, n, h));
}

// Writes one token's gradient through QK-norm's weight and statistic, adds to the weight's, returns the row dot.
template <class T>
INTERNVIT_INLINE float store_normed_grad(const float* grad_hat, const T* x, const float* weight, float rstd,
                                         int64_t head_dim, T* grad, float* grad_weight) {
  Sum dot;
  const Vec r = broadcast(rstd);
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) {
    const Vec scaled = load(grad_hat + d, lanes) * r, value = load(x + d, lanes), w = load(weight + d, lanes);
    store(grad + d, scaled * w, lanes);
    store(grad_weight + d, fma(scaled, value, load(grad_weight + d, lanes)), lanes);
    dot.part[u] = fma(scaled * w, value, dot.part[u]);
  });
  return dot.total();
}

// A strip's sum goes to the total, and the next begins at 0: the rounding of one chain grows with its length.
INTERNVIT_INLINE void add_strip(float* sum, int64_t head_dim, float* total) {
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) {
    store(total + d, load(total + d, lanes) + load(sum + d, lanes), lanes);
    store(sum + d, broadcast(0.0f), lanes);
  });
}

template <class T>
INTERNVIT_INLINE void store_grad(const float* grad_hat, int64_t head_dim, T* grad) {
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) { store(grad + d, load(grad_hat + d, lanes), lanes); });
}

// One row: q_hat k_hat^T to P, and dP to dS, in place.
INTERNVIT_INLINE void softmax_and_grad(float* scores, float* grad, int64_t n, float factor) {
  if (n == 0) return;
  const Vec scale = broadcast(factor), log2e = broadcast(kLog2E);
  for_lanes(n, INTERNVIT_BODY(c, lanes, u) { store(scores + c, load(scores + c, lanes) * scale, lanes); });
  const Vec shift = broadcast(row_maximum(scores, n));
  const float sum = exponentials(scores, n, [&](Vec x) __attribute__((always_inline)) { return (x - shift) * log2e; });
  const Vec inverse = broadcast(1.0f / sum);
  Sum total;
  for_lanes(n, INTERNVIT_BODY(c, lanes, u) {
    const Vec probability = load(scores + c, lanes) * inverse;
    store(scores + c, probability, lanes);
    total.part[u] = fma(probability, load(grad + c, lanes), total.part[u]);
  });
  const Vec delta = broadcast(total.total());
  for_lanes(n, INTERNVIT_BODY(c, lanes, u) {
    store(grad + c, load(scores + c, lanes) * (load(grad + c, lanes) - delta) * scale, lanes);
  });
}

template <class T>
void attention_backward_head(const AttentionBackwardParams& p, const AttentionBackwardScratch& s, int64_t b,
                             int64_t h) {
  const int64_t n_tokens = p.tokens, n_keys = p.keys, d = p.head_dim, dims = s.dims, columns = s.columns;
  const float* q_weight = p.q_weight ? p.q_weight + h * d : nullptr;
  const float* k_weight = p.k_weight ? p.k_weight + h * d : nullptr;
  float* grad_q_weight = q_weight ? p.grad_q_weight_partial + (b * p.heads + h) * d : nullptr;
  float* grad_k_weight = q_weight ? p.grad_k_weight_partial + (b * p.heads + h) * d : nullptr;
  const int64_t statistics = b * n_tokens, key_statistics = b * n_keys, dots = (b * p.heads + h) * p.row_stride;
  for (int64_t n = 0; n < columns; ++n) {
    const bool there = n < n_keys;
    const float rstd = there && q_weight ? p.rstd_k[key_statistics + n] : 1.0f;
    float* key = s.keys + n * dims;
    load_token(token<T>(p.k, b, there ? n : 0, h), k_weight, rstd, there ? d : 0, dims, key);
    store_column(key, dims, n, s.k_transposed);
    load_token(token<T>(p.v, b, there ? n : 0, h), nullptr, 1.0f, there ? d : 0, dims, s.row);
    store_column(s.row, dims, n, s.v_transposed);
  }
  __builtin_memset(s.grad_keys, 0, uint64_t(columns * dims) * sizeof(float));
  __builtin_memset(s.grad_values, 0, uint64_t(columns * dims) * sizeof(float));
  if (q_weight) {
    __builtin_memset(grad_q_weight, 0, uint64_t(d) * sizeof(float));
    __builtin_memset(grad_k_weight, 0, uint64_t(d) * sizeof(float));
    __builtin_memset(s.weight_sum, 0, uint64_t(d) * sizeof(float));
  }
  for (int64_t first = 0; first < n_tokens; first += kStrip) {
    const int64_t rows = min_of(kStrip, n_tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i;
      const float rstd = q_weight ? p.rstd_q[statistics + n] : 1.0f;
      load_token(token<T>(p.q, b, n, h), q_weight, rstd, d, dims, s.queries + i * dims);
      load_token(token<T>(p.grad_out, b, n, h), nullptr, 1.0f, d, dims, s.grads + i * dims);
    }
    multiply(rows, columns, d, {s.queries, dims, 1}, panels(s.k_transposed, dims), s.probabilities, columns, false);
    multiply(rows, columns, d, {s.grads, dims, 1}, panels(s.v_transposed, dims), s.grad_scores, columns, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* probability = s.probabilities + i * columns;
      float* grad_score = s.grad_scores + i * columns;
      softmax_and_grad(probability, grad_score, n_keys, p.scale);
    }
    multiply(n_keys, dims, rows, {s.probabilities, 1, columns}, row_major(s.grads, dims), s.grad_values, dims, true);
    multiply(n_keys, dims, rows, {s.grad_scores, 1, columns}, row_major(s.queries, dims), s.grad_keys, dims, true);
    multiply(rows, dims, n_keys, {s.grad_scores, columns, 1}, row_major(s.keys, dims), s.grad_queries, dims, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i;
      const float* grad_hat = s.grad_queries + i * dims;
      T* grad = writable<T>(p.grad_q, b, n, h);
      if (q_weight) {
        p.row_dot_q[dots + n] = store_normed_grad(grad_hat, token<T>(p.q, b, n, h), q_weight, p.rstd_q[statistics + n],
                                                  d, grad, s.weight_sum);
      } else {
        store_grad(grad_hat, d, grad);
      }
    }
    if (q_weight) add_strip(s.weight_sum, d, grad_q_weight);
  }
  for (int64_t n = 0; n < n_keys; ++n) {
    const float* grad_hat = s.grad_keys + n * dims;
    T* grad = writable<T>(p.grad_k, b, n, h);
    if (q_weight) {
      p.row_dot_k[dots + n] = store_normed_grad(grad_hat, token<T>(p.k, b, n, h), k_weight,
                                                p.rstd_k[key_statistics + n], d, grad, s.weight_sum);
      if ((n + 1) % kStrip == 0 || n + 1 == n_keys) add_strip(s.weight_sum, d, grad_k_weight);
    } else {
      store_grad(grad_hat, d, grad);
    }
    store_grad(s.grad_values + n * dims, d, writable<T>(p.grad_v, b, n, h));
  }
}

INTERNVIT_INLINE AttentionBackwardParams sequence_of(const AttentionBackwardParams& p, int64_t sequence) {
  AttentionBackwardParams image = image_of(p, sequence);
  const int64_t start = p.cu_seqlens[sequence], start_k = key_ends(p)[sequence];
  HeadsView *of_queries[] = {&image.grad_out, &image.out, &image.grad_q}, *of_keys[] = {&image.grad_k, &image.grad_v};
  for (HeadsView* x : of_queries) advance(*x, p.dtype, start);
  for (HeadsView* x : of_keys) advance(*x, p.dtype, start_k);
  if (!p.q_weight) return image;
  image.row_dot_q += start, image.row_dot_k += start_k;
  image.grad_q_weight_partial += sequence * p.heads * p.head_dim;
  image.grad_k_weight_partial += sequence * p.heads * p.head_dim;
  return image;
}

void attention_backward(const AttentionBackwardParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, {
    const int64_t bytes = AttentionBackwardScratch(nullptr, p.keys, p.head_dim).bytes;
    for_images<0>(p, executor, bytes,
                  [](const AttentionBackwardParams& image, void* memory, int64_t begin, int64_t end) {
                    const AttentionBackwardScratch s(memory, image.keys, image.head_dim);
                    for (int64_t unit = begin; unit < end; ++unit)
                      attention_backward_head<T>(image, s, unit / image.heads, unit % image.heads);
                  });
  });
}

}  // namespace internvit::INTERNVIT_ISA
