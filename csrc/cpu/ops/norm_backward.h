// The backward of norm.h, all parts in two passes over a row:
//
//   g     = grad_normed * weight,  x_hat = (x - mean) * rstd
//   grad  = rstd * (g - x_hat * mean(g * x_hat) [- mean(g)]) + grad_residual_out
//   grad_residual = grad,  grad_branch = grad * gamma * row_scale
//   grad_gamma = sum over rows of grad * row_scale * branch
//   grad_weight = sum over rows of grad_normed * x_hat,  grad_bias = sum over rows of grad_normed
//
// Rows are cut into chunks by their number alone. A chunk sums its rows by groups of kSummedRows and adds the groups
// in order to its own row of `partial`; the chunks are added in order. The bits are the same for any number of threads,
// and rounding hardly grows with the number of rows (200000 rows: 2.3e-7; 1.1e-6 without groups).
#pragma once

#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

template <class T, class R>
INTERNVIT_INLINE void norm_backward_row(const NormBackwardParams& p, int64_t row, float* grad_gamma, float* grad_weight,
                                        float* grad_bias) {
  const int64_t channels = p.channels;
  const R* x = static_cast<const R*>(p.x) + row * p.x_stride;
  const T* grad_normed = static_cast<const T*>(p.grad_normed) + row * p.grad_normed_stride;
  const Vec mean = broadcast(p.mean ? p.mean[row] : 0.0f);
  Vec rstd = broadcast(0.0f), mean_g = rstd, mean_g_x_hat = rstd;
  if (p.weight) {
    rstd = broadcast(p.rstd[row]);
    Sum sum_g, sum_g_x_hat;
    for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
      const Vec grad = load(grad_normed + c, lanes), g = grad * load(p.weight + c, lanes);
      const Vec x_hat = (load(x + c, lanes) - mean) * rstd;
      sum_g.part[u] = sum_g.part[u] + g;
      sum_g_x_hat.part[u] = fma(g, x_hat, sum_g_x_hat.part[u]);
      if (grad_weight) store(grad_weight + c, fma(grad, x_hat, load(grad_weight + c, lanes)), lanes);
      if (grad_bias) store(grad_bias + c, grad + load(grad_bias + c, lanes), lanes);
    });
    if (p.mean) mean_g = broadcast(sum_g.total() / float(channels));
    mean_g_x_hat = broadcast(sum_g_x_hat.total() / float(channels));
  }
  if (!p.grad_residual && !p.grad_branch && !grad_gamma) return;

  const R* grad_out = static_cast<const R*>(p.grad_residual_out) + row * p.grad_residual_out_stride;
  const T* branch = static_cast<const T*>(p.branch) + row * p.branch_stride;
  R* grad_residual = static_cast<R*>(p.grad_residual) + row * channels;
  T* grad_branch = static_cast<T*>(p.grad_branch) + row * channels;
  const Vec row_scale = broadcast(p.row_scale ? p.row_scale[row / p.rows_per_image] : 1.0f);
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
    Vec grad = broadcast(0.0f);
    if (p.weight) {
      const Vec g = load(grad_normed + c, lanes) * load(p.weight + c, lanes);
      const Vec x_hat = (load(x + c, lanes) - mean) * rstd;
      grad = ((g - x_hat * mean_g_x_hat) - mean_g) * rstd;
    }
    if (p.grad_residual_out) grad = grad + load(grad_out + c, lanes);
    if (p.grad_residual) store(grad_residual + c, grad, lanes);
    if (p.grad_branch) {
      const Vec scaled = p.gamma ? grad * load(p.gamma + c, lanes) : grad;
      store(grad_branch + c, scaled * row_scale, lanes);
    }
    if (grad_gamma) {
      const Vec product = grad * load(branch + c, lanes);
      store(grad_gamma + c, fma(product, row_scale, load(grad_gamma + c, lanes)), lanes);
    }
  });
}

constexpr int64_t kSummedRows = 32;

// Adds the sums over rows [first, last) to `partial` [3, C], by way of `group` [3, C].
template <class T, class R>
INTERNVIT_INLINE void norm_backward_chunk(const NormBackwardParams& p, int64_t first, int64_t last, float* partial,
                                          float* group) {
  const int64_t channels = p.channels;
  float* sums[kParameterKinds];
  for (int kind = 0; kind < kParameterKinds; ++kind) sums[kind] = p.grads[kind] ? group + kind * channels : nullptr;
  int64_t begin = first;
  do {
    for (float* target : sums)
      if (target) __builtin_memset(target, 0, uint64_t(channels) * sizeof(float));
    const int64_t end = min_of(begin + kSummedRows, last);
    for (int64_t row = begin; row < end; ++row)
      norm_backward_row<T, R>(p, row, sums[kGamma], sums[kWeight], sums[kBias]);
    for (int kind = 0; kind < kParameterKinds; ++kind) {
      if (!sums[kind]) continue;
      float* const total = partial + kind * channels;
      for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
        const Vec before = begin > first ? load(total + c, lanes) : broadcast(0.0f);
        store(total + c, before + load(sums[kind] + c, lanes), lanes);
      });
    }
    begin = end;
  } while (begin < last);
}

template <class T, class R>
void norm_backward_rows(const NormBackwardParams& p, const Executor& executor) {
  const int64_t channels = p.channels, chunks = p.partial_rows;
  parallel(executor, chunks, 1, [&](int64_t begin, int64_t end) {
    float* group = static_cast<float*>(executor.scratch(kParameterKinds * channels * int64_t(sizeof(float))));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      norm_backward_chunk<T, R>(p, p.rows * chunk / chunks, p.rows * (chunk + 1) / chunks,
                                p.partial + chunk * kParameterKinds * channels, group);
  });
  if (!p.grads[kGamma] && !p.grads[kWeight] && !p.grads[kBias]) return;
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  parallel(executor, vectors, 16, [&](int64_t begin, int64_t end) {
    for (int kind = 0; kind < kParameterKinds; ++kind) {
      if (!p.grads[kind]) continue;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i * kLanes, n = min_of(kLanes, channels - c);
        Vec total = broadcast(0.0f);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total = total + load(p.partial + (chunk * kParameterKinds + kind) * channels + c, n);
        store(p.grads[kind] + c, total, n);
      }
    }
  });
}

void norm_backward(const NormBackwardParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, {
    if (p.residual_dtype == p.dtype) {
      norm_backward_rows<T, T>(p, executor);
    } else {
      norm_backward_rows<T, float>(p, executor);
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
