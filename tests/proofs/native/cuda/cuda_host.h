// CUDA's names for g++: csrc/cuda's bodies run on the host, a block's threads as fibers of one thread (cuda_host.cpp).
//
// A block's fibers run one at a time, each until it meets a barrier, a shuffle or its end, in an order that the caller
// chooses. What a GPU leaves to chance is checked exactly:
//   __syncthreads      every thread of the block comes, or has ended; else the launch fails: "threads wait ..."
//   __shfl_xor_sync    the caller is in its mask, all lanes of the mask exist and come with the same mask and offset
//   Shared<T>          no two threads touch a cell between two barriers if one of them writes; what is read was written
// A failed check makes `launch` return its description, as a failed launch does on a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "cuda/kernels.h"

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define INTERNVIT_DEVICE inline

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace internvit::cuda::host {

enum class Order { kAscending, kDescending, kShuffled };  // of a block's threads, and of the blocks

struct Settings {
  Order order = Order::kAscending;
  uint64_t seed = 1;
};
extern Settings settings;

struct Cell {  // who touched a cell of shared memory last, and between which barriers
  uint64_t written_in = 0, read_in = 0, block = 0;
  int writer = -1, reader = -1;
};
void read_cell(Cell& cell);
void write_cell(Cell& cell);

void barrier();
float shuffle_xor(uint32_t mask, float x, int offset);
const char* run(dim3 grid, dim3 block, const std::function<void()>& body);

// Blocks of a kernel that a multiprocessor holds: 2 to 4, another number for each next kernel that is asked for.
int resident_blocks(const void* kernel);

}  // namespace internvit::cuda::host

inline void __syncthreads() { internvit::cuda::host::barrier(); }
inline float __shfl_xor_sync(uint32_t mask, float x, int offset) {
  return internvit::cuda::host::shuffle_xor(mask, x, offset);
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int __float2int_rn(float x) { return x == x ? int(std::nearbyint(x)) : 0; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline int min(int a, int b) { return a < b ? a : b; }

namespace internvit::cuda {

template <class S>
class Shared {
 public:
  operator S() const {
    host::read_cell(cell_);
    return value_;
  }
  Shared& operator=(S value) {
    host::write_cell(cell_);
    value_ = value;
    return *this;
  }

 private:
  S value_ = {};
  mutable host::Cell cell_;
};

inline float reciprocal_estimate(float x) { return 1.0f / x; }
inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float widened(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float widened(f16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return float(half);
}
inline uint32_t packed(float low, float high, bf16) {
  const auto one = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
}
inline uint32_t packed(float low, float high, f16) {
  const auto one = [](float x) {
    const _Float16 half = _Float16(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return uint32_t(bits);
  };
  return one(low) | one(high) << 16;
}

template <class Argument>
int resident_blocks_of(void (*kernel)(Argument), int) {
  return host::resident_blocks(reinterpret_cast<const void*>(kernel));
}

template <class Argument>
const char* launch(void (*kernel)(Argument), dim3 grid, dim3 block, void*, const Argument& argument) {
  return host::run(grid, block, [&] { kernel(argument); });
}

}  // namespace internvit::cuda
