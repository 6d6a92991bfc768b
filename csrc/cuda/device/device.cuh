// The few things a body needs that the host has otherwise: conversions in one instruction, launches, and the types
// whose accesses the host harness watches (tests/proofs/native/cuda_host.h, which also gives g++ the names that nvcc
// knows).
#pragma once

#include <cstdint>

#include "cuda/kernels.h"

#if !defined(__CUDACC__)
#include "cuda_host.h"
#else
#define INTERNVIT_DEVICE __device__ __forceinline__
#endif

namespace internvit::cuda {

// Sign, 4 bits of exponent with a bias of 7, 3 of mantissa. Below 2^-6 values are multiples of 2^-9: adding 2^14 leaves
// the multiple in the low bits.
INTERNVIT_DEVICE uint32_t e4m3_bits(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const float size = __uint_as_float(magnitude);
  uint32_t code = 0x7eu;
  if (size < 0.015625f) {
    code = __float_as_uint(size + 16384.0f) - __float_as_uint(16384.0f);
  } else if (size < 448.0f) {
    code = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
  }
  return (bits >> 24 & 0x80u) | code;
}

#if defined(__CUDACC__)

// A cell of __shared__ memory; on the host it reports reads and writes that no barrier separates.
template <class S>
using Shared = S;

INTERNVIT_DEVICE float widened(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
INTERNVIT_DEVICE float widened(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// 1 / x and 2^x in one instruction, within 1 and 2 ulp; denormal numbers count as 0.
INTERNVIT_DEVICE float reciprocal_estimate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INTERNVIT_DEVICE float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest, even, into one register; `low` has the lower address.
INTERNVIT_DEVICE uint32_t packed(float low, float high, bf16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
INTERNVIT_DEVICE uint32_t packed(float low, float high, f16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The nearest float8_e4m3fn, ties to even, at most 448; x is no NaN.
INTERNVIT_DEVICE uint32_t to_e4m3(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  return y & 0xffu;
#else
  return e4m3_bits(x);
#endif
}

template <class Argument>
const char* launch(void (*kernel)(Argument), dim3 grid, dim3 block, void* stream, const Argument& argument) {
  // clang-format off: it takes the launch for shifts
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(argument);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of `threads` that a multiprocessor of the current device holds, as registers and shared memory allow; 0 where
// the device does not say.
template <class Argument>
int resident_blocks_of(void (*kernel)(Argument), int threads) {
  int blocks = 0;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) == cudaSuccess ? blocks : 0;
}

#else

INTERNVIT_DEVICE uint32_t to_e4m3(float x) { return e4m3_bits(x); }

#endif

}  // namespace internvit::cuda
