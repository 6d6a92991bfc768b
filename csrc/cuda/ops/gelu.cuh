// The exact GELU and its derivative, of the pre-activation as stored. Product and bias are cuBLASLt's, which adds the
// bias in float32 before its one rounding: added here, to a product already rounded, it would cost a second one.
//
//   gelu(z) = z Phi(z),  gelu'(z) = Phi(z) + z exp(-z^2 / 2) / sqrt(2 pi),  Phi(z) = erfc(-z / sqrt(2)) / 2
//
// With erfc the negative tail keeps its digits, which z (1 + erf) / 2 loses.
#pragma once

#include "cuda/device/rows.cuh"

namespace internvit::cuda {

INTERNVIT_DEVICE float normal_cdf(float z) { return 0.5f * erfcf(z * -0.7071067812f); }
INTERNVIT_DEVICE float gelu_of(float z) { return z * normal_cdf(z); }
INTERNVIT_DEVICE float gelu_slope(float z) {
  return fmaf(z, 0.3989422804f * exp2f(z * z * -0.7213475204f), normal_cdf(z));
}

constexpr int kGeluThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kGeluThreads) gelu_kernel(const __grid_constant__ GeluParams p) {
  constexpr int W = kWidth<T>;
  const int64_t first = (int64_t(blockIdx.x) * kGeluThreads + threadIdx.x) * W;
  if (first >= p.size) return;
  const int count = p.size - first < W ? int(p.size - first) : W;
  const bool whole = kAligned && count == W;  // the last vector may not be
  const T* pre_activation = static_cast<const T*>(p.pre_activation) + first;
  const Chunk<T, W> z = whole ? load<true, W>(pre_activation, count) : load<false, W>(pre_activation, count);
  float y[W];
  if (p.grad_y) {
    const T* grad_y = static_cast<const T*>(p.grad_y) + first;
    const Chunk<T, W> grad = whole ? load<true, W>(grad_y, count) : load<false, W>(grad_y, count);
#pragma unroll
    for (int i = 0; i < W; ++i) y[i] = grad[i] * gelu_slope(z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) y[i] = gelu_of(z[i]);
  }
  Chunk<T, W> chunk;
  chunk.set(y);
  T* out = static_cast<T*>(p.y) + first;
  if (whole) {
    store<true>(out, chunk, count);
  } else {
    store<false>(out, chunk, count);
  }
}

}  // namespace internvit::cuda
