// The gradient that flows through the statistics of QK-norm, added in place (the statistics themselves: norm.cuh).
//
//   grad_x -= grad_rstd * rstd^3 / C * x
#pragma once

#include "cuda/device/rows.cuh"

namespace internvit::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    qk_norm_stats_backward_kernel(const __grid_constant__ Jobs<QKNormStatsBackwardParams> jobs) {
  constexpr int W = kWidth<T>;
  const QKNormStatsBackwardParams& p = jobs.job[blockIdx.y];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  // rstd^3 of a row of 1e18 is below float32's range: the last factor goes to x.
  const float rstd = p.rstd[row], slope = -(p.grad_rstd[row] * rstd) * rstd / float(p.channels);
  const T* x_row = static_cast<const T*>(p.x) + row * p.x_stride;
  T* grad_row = static_cast<T*>(p.grad_x) + row * p.grad_x_stride;
  for (int v = 0;; ++v) {
    const Column<W> column(v, p.channels);
    if (column.count <= 0) break;
    const Chunk<T, W> x = load<kAligned, W>(x_row + column.c, column.count);
    Chunk<T, W> grad = load<kAligned, W>(grad_row + column.c, column.count);
    float sum[W];
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] = fmaf(slope, x[i] * rstd, grad[i]);
    grad.set(sum);
    store<kAligned>(grad_row + column.c, grad, column.count);
  }
}

}  // namespace internvit::cuda
