// The exact GELU and its derivative, of the pre-activation as stored (the formula: common/gelu_fit.h). Product and bias
// are cuBLASLt's, which adds the bias in float32 before its one rounding: added here, to a product already rounded, it
// would cost a second one.
//
// Eight bfloat16 elements take 139 instructions on sm_90, load and store included, and 166 backward; with erfcf 421 and
// 486. Float32, four elements: 110 and 121 instead of 207 and 242.
#pragma once

#include "common/gelu_fit.h"
#include "cuda/device/rows.cuh"

namespace internvit::cuda {

struct GeluParts {
  float cdf;       // Phi(z)
  float gaussian;  // exp(-z^2 / 2) / sqrt(2 pi)
};

// 2^24: exponentials of 16-bit elements are that much larger, and their factors smaller, so that what the instruction
// flushes to zero is below 2^-150. exp2f keeps denormal numbers as well, in four instructions, and every digit of a
// float32 exponent, of which the addend takes 24.
constexpr float kGeluLift = 24.0f, kGeluLower = 1.0f / 16777216;

template <class T>
INTERNVIT_DEVICE GeluParts gelu_parts(float z) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr GeluFit<T> kFit;
  constexpr float kScale = kWide ? 1.0f : kGeluLower;
  const float a = kWide ? fminf(fabsf(z), 14.5f) : fabsf(z);  // the tail is 0 in float32 beyond
  const float denominator = fmaf(a, kFit.c, 1.0f);
  float t = reciprocal_estimate(denominator);
  if constexpr (kWide) t = fmaf(t, fmaf(-denominator, t, 1.0f), t);
  float r = kFit.r[0] * kScale;
#pragma unroll
  for (int i = 1; i < int(sizeof(kFit.r) / sizeof(float)); ++i) r = fmaf(r, t, kFit.r[i] * kScale);
  const float square = a * a;
  const float gaussian = kWide ? exp2f(square * -0.7213475204f) : exp2_flushed(fmaf(square, -0.7213475204f, kGeluLift));
  const float tail = gaussian * r;
  return {z < 0.0f ? tail : 1.0f - tail, gaussian * (0.3989422804f * kScale)};
}

template <class T>
INTERNVIT_DEVICE float gelu_of(float z) {
  return z * gelu_parts<T>(z).cdf;
}
template <class T>
INTERNVIT_DEVICE float gelu_slope(float z) {
  const GeluParts parts = gelu_parts<T>(z);
  return fmaf(z, parts.gaussian, parts.cdf);
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
    for (int i = 0; i < W; ++i) y[i] = grad[i] * gelu_slope<T>(z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) y[i] = gelu_of<T>(z[i]);
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
