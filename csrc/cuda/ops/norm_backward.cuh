// The backward of norm.cuh, all parts in one pass over a row held in registers:
//
//   g     = grad_normed * weight,  x_hat = (x - mean) * rstd
//   grad  = rstd * (g - x_hat * mean(g * x_hat) [- mean(g)]) + grad_residual_out
//   grad_residual = grad,  grad_branch = grad * gamma * row_scale
//   grad_gamma = sum over rows of grad * row_scale * branch
//   grad_weight = sum over rows of grad_normed * x_hat,  grad_bias = sum over rows of grad_normed
//
// Blocks walk over the rows, one tile of blockDim.y rows after another, and keep the sums over rows in registers. Each
// writes one row of float32 sums; sum_partials_kernel adds these in a fixed order. No atomics: the same bits each run.
#pragma once

#include "cuda/device/rows.cuh"

namespace internvit::cuda {

// The rows of a block are added in order, in shared memory; the last one writes the sum to `destination` [C].
template <int V, bool kAligned, int W>
INTERNVIT_DEVICE void write_block_sum(const float (&sum)[V][W], float* destination, int channels) {
  __shared__ Shared<float> rows_before[V * W * kMaxSharingLanes];
  const int lanes = int(blockDim.x), last = int(blockDim.y) - 1;
  for (int y = 0; y < last; ++y) {
    if (int(threadIdx.y) == y) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const int cell = (v * W + i) * lanes + int(threadIdx.x);
          rows_before[cell] = y == 0 ? sum[v][i] : float(rows_before[cell]) + sum[v][i];
        }
      }
    }
    __syncthreads();
  }
  if (int(threadIdx.y) == last) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Column<W> column(v, channels);
      float total[W];
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const int cell = (v * W + i) * lanes + int(threadIdx.x);
        total[i] = last == 0 ? sum[v][i] : float(rows_before[cell]) + sum[v][i];
      }
      Chunk<float, W> chunk;
      chunk.set(total);
      store<kAligned>(destination + column.c, chunk, column.count);
    }
  }
  if (last > 0) __syncthreads();  // before the next sum takes the cells
}

// kLayerNorm: with a mean and grad_bias; it does RMSNorm's work as well, with the same bits, at a cost in registers.
template <class T, class R, int V, bool kAligned, bool kLayerNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    norm_backward_kernel(const __grid_constant__ Jobs<NormBackwardParams> jobs) {
  constexpr int W = kWidth<R>;
  // Registers of sums and of what is read; above 210 the second half of it is read late, where it is used.
  constexpr int kHeld = V * W * (kLayerNorm ? 3 : 2) + V * W * 2 * int(sizeof(R) + sizeof(T)) / 4;
  constexpr bool kEarly = kAligned && kHeld <= 210;
  __shared__ GroupSums<2> group_sums;
  const NormBackwardParams& p = jobs.job[blockIdx.y];
  float grad_gamma[V][W] = {}, grad_weight[V][W] = {}, grad_bias[V][W] = {};
  const int64_t tiles = (p.rows + blockDim.y - 1) / blockDim.y;
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
    const int64_t row = tile * blockDim.y + threadIdx.y;
    const bool active = row < p.rows;  // the others add zeros and meet at every barrier and shuffle
    const R* x_row = static_cast<const R*>(p.x) + row * p.x_stride;
    Chunk<R, W> x[V] = {};
    Chunk<T, W> grad_normed[V] = {};
    float mean = 0.0f, rstd = 0.0f, mean_of[2] = {0.0f, 0.0f};  // of g, and of g * x_hat
    if (p.weight.data) {
      if (active) {
        const T* grad_row = static_cast<const T*>(p.grad_normed) + row * p.grad_normed_stride;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Column<W> column(v, p.channels);
          x[v] = load<kAligned, W>(x_row + column.c, column.count);
          grad_normed[v] = load<kAligned, W>(grad_row + column.c, column.count);
        }
        rstd = p.rstd[row];
        if (kLayerNorm && p.mean) mean = p.mean[row];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Column<W> column(v, p.channels);
        float weight[W];
        load_parameter<kAligned, T>(p.weight, column.c, column.count, 0.0f, weight);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float grad = grad_normed[v][i], g = grad * weight[i], x_hat = (x[v][i] - mean) * rstd;
          if constexpr (kLayerNorm) mean_of[0] += g;
          mean_of[1] = fmaf(g, x_hat, mean_of[1]);
          grad_weight[v][i] = fmaf(grad, x_hat, grad_weight[v][i]);
          if constexpr (kLayerNorm) grad_bias[v][i] += grad;
        }
      }
      sum_over_row(mean_of, group_sums, turn);
      mean_of[0] = kLayerNorm && p.mean ? mean_of[0] / float(p.channels) : 0.0f;
      mean_of[1] /= float(p.channels);
    }
    if (!active || !(p.grad_residual || p.grad_branch || p.grads[kGamma].data)) continue;

    const float row_scale = p.row_scale ? p.row_scale[row / p.rows_per_image] : 1.0f;
    const R* grad_out = static_cast<const R*>(p.grad_residual_out) + row * p.grad_residual_out_stride;
    const T* branch = static_cast<const T*>(p.branch) + row * p.branch_stride;
    R* grad_residual = static_cast<R*>(p.grad_residual) + row * p.channels;
    T* grad_branch = static_cast<T*>(p.grad_branch) + row * p.channels;
    Chunk<R, W> added[V] = {};
    Chunk<T, W> other[V] = {};
#pragma unroll
    for (int v = 0; v < V && kEarly; ++v) {  // all loads before the first store, which they may not pass
      const Column<W> column(v, p.channels);
      if (p.grad_residual_out) added[v] = load<kAligned, W>(grad_out + column.c, column.count);
      if (p.grads[kGamma].data) other[v] = load<kAligned, W>(branch + column.c, column.count);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Column<W> column(v, p.channels);
      if constexpr (!kEarly) {
        if (p.grad_residual_out) added[v] = load<kAligned, W>(grad_out + column.c, column.count);
        if (p.grads[kGamma].data) other[v] = load<kAligned, W>(branch + column.c, column.count);
      }
      float grad[W] = {}, factor[W];
      if (p.weight.data) {
        load_parameter<kAligned, T>(p.weight, column.c, column.count, 0.0f, factor);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float g = grad_normed[v][i] * factor[i], x_hat = (x[v][i] - mean) * rstd;
          grad[i] = __fmul_rn(fmaf(-x_hat, mean_of[1], g) - mean_of[0], rstd);
        }
      }
      // Two roundings, spelt out: contracted to one, the fused op's gradient would not be the sum of the two ops'.
#pragma unroll
      for (int i = 0; i < W; ++i) grad[i] += added[v][i];
      if (p.grad_residual) {
        Chunk<R, W> chunk;
        chunk.set(grad);
        store<kAligned>(grad_residual + column.c, chunk, column.count);
      }
#pragma unroll
      for (int i = 0; i < W; ++i) grad_gamma[v][i] = fmaf(grad[i] * other[v][i], row_scale, grad_gamma[v][i]);
      if (p.grad_branch) {
        load_parameter<kAligned, T>(p.gamma, column.c, column.count, 1.0f, factor);
#pragma unroll
        for (int i = 0; i < W; ++i) grad[i] = grad[i] * factor[i] * row_scale;
        Chunk<T, W> chunk;
        chunk.set(grad);
        store<kAligned>(grad_branch + column.c, chunk, column.count);
      }
    }
  }
  float* partial = p.partial + int64_t(blockIdx.x) * kParameterKinds * p.channels;
  if (p.grads[kGamma].data) write_block_sum<V, kAligned>(grad_gamma, partial, p.channels);
  if (p.grads[kWeight].data) write_block_sum<V, kAligned>(grad_weight, partial + p.channels, p.channels);
  if (kLayerNorm && p.grads[kBias].data)
    write_block_sum<V, kAligned>(grad_bias, partial + 2 * int64_t(p.channels), p.channels);
}

// Threads: a column is 4 channels, a slice every 16th partial row. Eight loads are in flight a thread: 264 partial rows
// are three rounds that wait for memory; with 8 slices and four loads they were nine.
constexpr int kSumColumns = 16, kSumSlices = 16;

// grads[blockIdx.y] of job blockIdx.z: the sum over programs, slice by slice, then over the slices.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sum_partials_kernel(const __grid_constant__ Jobs<NormBackwardParams> jobs) {
  __shared__ Shared<float> slices[kSumSlices][4][kSumColumns];
  const NormBackwardParams& p = jobs.job[blockIdx.z];
  const ParameterGrad& grad = p.grads[blockIdx.y];
  if (!grad.data) return;
  const int c = (int(blockIdx.x) * kSumColumns + int(threadIdx.x)) * 4, count = min(p.channels - c, 4);
  const int64_t stride = int64_t(kParameterKinds) * p.channels;
  const float* partial = p.partial + int64_t(blockIdx.y) * p.channels + c;
  float total[4] = {};
#pragma unroll 8
  for (int program = int(threadIdx.y); program < p.partial_rows; program += kSumSlices) {
    const Chunk<float, 4> row = load<kAligned, 4>(partial + program * stride, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += row[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) slices[threadIdx.y][i][threadIdx.x] = total[i];
  __syncthreads();
  if (threadIdx.y > 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    float sum = slices[0][i][threadIdx.x];
    for (int slice = 1; slice < kSumSlices; ++slice) sum += slices[slice][i][threadIdx.x];
    if (sizeof(T) == 4 || grad.is_float32) {
      static_cast<float*>(grad.data)[c + i] = sum;
    } else {
      Chunk<T, 8> rounded_sum;
      const float several[8] = {sum};
      rounded_sum.set(several);
      store<false>(static_cast<T*>(grad.data) + c + i, rounded_sum, 1);
    }
  }
}

}  // namespace internvit::cuda
