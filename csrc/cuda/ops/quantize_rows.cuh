// Rows as int8 or float8_e4m3fn with a scale and a zero point each: x = x_scale * (x_q - x_zero), as
// cpu/ops/quantize_rows.h says; of x, of its GELU, and of the norms (norm.cuh). Float32 values give the same bits as on
// CPUs.
#pragma once

#include "cuda/device/rows.cuh"
#include "cuda/ops/gelu.cuh"

namespace internvit::cuda {

constexpr float kLeastRange = 1e-30f, kLargestE4M3 = 448.0f;

struct RowQuantization {
  float inverse, scale;
  int zero;
};

// Of the values x of this lane; what lies beyond the row holds 0. Of a value that is not finite the range is infinite.
template <int W, int V>
INTERNVIT_DEVICE RowQuantization quantization_of(const float (&x)[V][W], const QuantizedRows& out) {
  __shared__ GroupSums<2> parts;
  constexpr float kInfinity = __builtin_huge_valf();
  float ends[2] = {0.0f, 0.0f};  // -min(x, 0), max(x, 0)
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float value = fabsf(x[v][i]) < kInfinity ? x[v][i] : kInfinity;
      ends[0] = fmaxf(ends[0], -value);
      ends[1] = fmaxf(ends[1], value);
    }
  }
  max_over_row(ends, parts, 0);
  const float range = out.symmetric ? fmaxf(ends[0], ends[1]) : ends[1] + ends[0];
  const float steps = !out.symmetric ? 255.0f : out.dtype == kInt8 ? 127.0f : kLargestE4M3;
  const bool finite = range < kInfinity, zero_row = range < kLeastRange;
  RowQuantization row = {0.0f, 0.0f, 0};
  if (finite && !zero_row) row.inverse = steps / range;
  if (!zero_row) row.scale = finite ? range / steps : __uint_as_float(0x7fc00000u);
  if (!out.symmetric && row.inverse > 0.0f) row.zero = __float2int_rn(ends[0] * row.inverse) - 128;
  return row;
}

// W values as they lie in memory.
template <int W>
INTERNVIT_DEVICE void quantized(const float (&x)[W], const RowQuantization& row, DType dtype,
                                uint32_t (&words)[W / 4]) {
#pragma unroll
  for (int w = 0; w < W / 4; ++w) words[w] = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    float value = x[i] * row.inverse;
    value = value == value ? value : 0.0f;  // in a row that is not finite
    uint32_t byte;
    if (dtype == kInt8) {
      const int whole = __float2int_rn(value) + row.zero;
      byte = uint32_t(whole < -128 ? -128 : whole > 127 ? 127 : whole) & 0xffu;
    } else {
      byte = to_e4m3(value);
    }
    words[i / 4] |= byte << 8 * (i % 4);
  }
}

template <int V, bool kAligned, int W>
INTERNVIT_DEVICE void write_quantized(const QuantizedRows& out, int64_t i_row, int channels, const float (&x)[V][W],
                                      const RowQuantization& row) {
  uint8_t* x_q = static_cast<uint8_t*>(out.x_q) + i_row * channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, channels);
    uint32_t words[W / 4];
    quantized(x[v], row, out.dtype, words);
    if constexpr (!kAligned) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i < column.count) x_q[column.c + i] = uint8_t(words[i / 4] >> 8 * (i % 4));
    } else if (column.count > 0) {
      if constexpr (W == 8) {
        *reinterpret_cast<uint2*>(x_q + column.c) = make_uint2(words[0], words[1]);
      } else {
        *reinterpret_cast<uint32_t*>(x_q + column.c) = words[0];
      }
    }
  }
  if (threadIdx.x != 0) return;
  out.x_scale[i_row] = row.scale;
  out.x_zero[i_row] = row.zero;
}

template <class T, int V, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  constexpr int W = kWidth<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < p.rows;  // the others meet at every barrier and shuffle
  float x[V][W] = {};
  if (active) load_row<kAligned>(static_cast<const T*>(p.x) + row * p.x_stride, p.channels, x);
  if (p.gelu) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < W; ++i) x[v][i] = gelu_of<float>(x[v][i]);  // of 0 beyond the row: 0
    }
  }
  const RowQuantization quantization = quantization_of(x, p.quantized);
  if (active) write_quantized<V, kAligned>(p.quantized, row, p.channels, x, quantization);
}

}  // namespace internvit::cuda
