// The row kernel behind every norm, QK-norm, their statistics and layer_scale_residual, forward:
//
//   residual_out = residual + row_scale[b] * gamma * x      where a residual is given; then x is residual_out as stored
//   normed       = (x - mean) * rstd * weight + bias        where statistics are wanted; or quantised from float32
//
// One body for all of them gives the fused op and its parts the same bits. A row is read once and stays in registers
// between the reduction and the output.
#pragma once

#include "cuda/device/rows.cuh"
#include "cuda/ops/quantize_rows.cuh"

namespace internvit::cuda {

// Squares are taken of x / 64: rows of 1e18 would overflow their sum, and a power of two costs no accuracy.
constexpr float kShrink = 1.0f / 64;

// Below it eps does not hide the squares that float32 has no digits for, of |x| < 1e-19: those of x over the sum of |x|
// are taken instead, at the cost of one more reduction.
constexpr float kLeastEps = 1e-29f, kMostShrink = 1152921504606846976.0f;  // 2^60

struct RowStatistics {
  float mean, rest, rstd;  // the mean is mean + rest: one float32 is too coarse where it is large beside the deviations
};

// x of this lane; what lies beyond the row holds 0.
template <int W, int V>
INTERNVIT_DEVICE RowStatistics row_statistics(const float (&x)[V][W], int channels, bool layer_norm, float eps) {
  __shared__ GroupSums<1> sums;
  __shared__ GroupSums<2> centred_sums;
  RowStatistics s = {0.0f, 0.0f, 0.0f};
  float total[1] = {0.0f}, centred[2] = {0.0f, 0.0f}, shrink = kShrink, variance;  // of x * shrink
  if (eps < kLeastEps) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < W; ++i) total[0] += fabsf(x[v][i]);
    }
    sum_over_row(total, sums, 1);
    shrink = fminf(1.0f / total[0], kMostShrink);
    total[0] = 0.0f;
  }
  if (layer_norm) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < W; ++i) total[0] += x[v][i];
    }
    sum_over_row(total, sums, 0);
    // A pivot of 7 bits: x - pivot is exact for 16-bit x. With all 24 bits the same rounding error would repeat in
    // every element of a binade, and shift the mean by half an ulp of 1.
    s.mean = __uint_as_float(__float_as_uint(total[0] / float(channels)) & 0xfffe0000u);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Column<W> column(v, channels);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float d = i < column.count ? x[v][i] - s.mean : 0.0f, small = d * shrink;
        centred[0] += d;
        centred[1] = fmaf(small, small, centred[1]);
      }
    }
    sum_over_row(centred, centred_sums, 0);
    s.rest = centred[0] / float(channels);
    const float rest = s.rest * shrink;
    variance = fmaxf(fmaf(-rest, rest, centred[1] / float(channels)), 0.0f);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float small = x[v][i] * shrink;
        total[0] = fmaf(small, small, total[0]);
      }
    }
    sum_over_row(total, sums, 0);
    variance = total[0] / float(channels);
  }
  s.rstd = __frsqrt_rn(fmaf(eps * shrink, shrink, variance)) * shrink;
  return s;
}

// residual + row_scale * gamma * branch as R stores it, to memory and to x.
template <class T, class R, int V, bool kAligned, int W>
INTERNVIT_DEVICE void add_branch(const NormParams& p, int64_t row, float (&x)[V][W]) {
  const R* residual = static_cast<const R*>(p.residual) + row * p.residual_stride;
  const T* branch = static_cast<const T*>(p.x) + row * p.x_stride;
  R* out = static_cast<R*>(p.residual_out) + row * p.channels;
  const float row_scale = p.row_scale ? p.row_scale[row / p.rows_per_image] : 1.0f;
  Chunk<R, W> sums[V];
  Chunk<T, W> added[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, p.channels);
    sums[v] = load<kAligned, W>(residual + column.c, column.count);
    added[v] = load<kAligned, W>(branch + column.c, column.count);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, p.channels);
    float gamma[W];
    load_parameter<kAligned, T>(p.gamma, column.c, column.count, 1.0f, gamma);
#pragma unroll
    for (int i = 0; i < W; ++i) x[v][i] = fmaf(added[v][i] * gamma[i], row_scale, sums[v][i]);
    sums[v].set(x[v]);
    store<kAligned>(out + column.c, sums[v], column.count);
#pragma unroll
    for (int i = 0; i < W; ++i) x[v][i] = sums[v][i];
  }
}

// The W normed values of one vector, in float32.
template <class T, class R, bool kAligned, int W>
INTERNVIT_DEVICE void scale_and_shift(const NormParams& p, const Column<W>& column, const float (&x)[W],
                                      const RowStatistics& s, float (&y)[W]) {
  float weight[W], bias[W];
  load_parameter<kAligned, T>(p.weight, column.c, column.count, 1.0f, weight);
  load_parameter<kAligned, T>(p.bias, column.c, column.count, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float x_hat = ((x[i] - s.mean) - s.rest) * s.rstd;
    y[i] = fmaf(p.round_before_weight ? rounded<R>(x_hat) : x_hat, weight[i], bias[i]);
  }
}

template <class T, class R, int V, bool kAligned, int W>
INTERNVIT_DEVICE void write_normed(const NormParams& p, int64_t row, const float (&x)[V][W], const RowStatistics& s) {
  T* normed = static_cast<T*>(p.normed) + row * p.channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, p.channels);
    float y[W];
    scale_and_shift<T, R, kAligned>(p, column, x[v], s, y);
    Chunk<T, W> chunk;
    chunk.set(y);
    store<kAligned>(normed + column.c, chunk, column.count);
  }
}

// What is normalised, of this lane: the branch added to the residual, or x.
template <class T, class R, int V, bool kAligned, int W>
INTERNVIT_DEVICE void load_or_add(const NormParams& p, int64_t row, float (&x)[V][W]) {
  if (p.residual) {
    add_branch<T, R, V, kAligned>(p, row, x);
  } else {
    load_row<kAligned>(static_cast<const R*>(p.x) + row * p.x_stride, p.channels, x);
  }
}

template <class T, class R, int V, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const __grid_constant__ Jobs<NormParams> jobs) {
  constexpr int W = kWidth<R>;
  const NormParams& p = jobs.job[blockIdx.y];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < p.rows;  // the others meet at every barrier and shuffle
  float x[V][W] = {};
  if (active) load_or_add<T, R, V, kAligned>(p, row, x);
  if (!p.rstd) return;
  const RowStatistics s = row_statistics<W, V>(x, p.channels, p.layer_norm, p.eps);
  if (!active) return;
  if (threadIdx.x == 0) {
    p.rstd[row] = s.rstd;
    if (p.mean) p.mean[row] = s.mean + s.rest;
  }
  if (p.normed) write_normed<T, R, V, kAligned>(p, row, x, s);
}

// The same with the normed row quantised. A kernel of its own: the row stays in registers through one more reduction.
// The second launch bound keeps ptxas from spilling 8 bytes for more blocks a multiprocessor (sm_100, rows of odd
// widths).
template <class T, class R, int V, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_quantized_kernel(const __grid_constant__ Jobs<NormParams> jobs) {
  constexpr int W = kWidth<R>;
  const NormParams& p = jobs.job[blockIdx.y];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < p.rows;
  float x[V][W] = {};
  if (active) load_or_add<T, R, V, kAligned>(p, row, x);
  const RowStatistics s = row_statistics<W, V>(x, p.channels, p.layer_norm, p.eps);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, p.channels);
    float y[W];
    scale_and_shift<T, R, kAligned>(p, column, x[v], s, y);
#pragma unroll
    for (int i = 0; i < W; ++i) x[v][i] = i < column.count ? y[i] : 0.0f;
  }
  const RowQuantization quantization = quantization_of(x, p.quantized);
  if (active) write_quantized<V, kAligned>(p.quantized, row, p.channels, x, quantization);
}

}  // namespace internvit::cuda
