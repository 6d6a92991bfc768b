// How a block holds rows: blockDim.x lanes a row, blockDim.y rows; a lane has V vectors of W elements in registers,
// vector v at column (v * lanes + lane) * W, so that neighbouring lanes touch neighbouring vectors: 16 bytes of the
// residual, and of a 16-bit branch beside a float32 residual 8 bytes.
//
// kAligned: every pointer, stride and C is a multiple of a vector, which moves in one access. Else elements move one by
// one, in the same layout and with the same order of summation: the bits do not depend on the alignment.
#pragma once

#include "cuda/device/device.cuh"
#include "cuda/device/launch.h"

namespace internvit::cuda {

// Elements of a vector, where the residual is R.
template <class R>
constexpr int kWidth = 16 / int(sizeof(R));

// N elements of S as they lie in memory.
template <class S, int N>
struct Chunk {
  static constexpr int kWords = N * int(sizeof(S)) / 4;
  uint32_t words[kWords];

  INTERNVIT_DEVICE float operator[](int i) const { return element(i, S{}); }
  INTERNVIT_DEVICE void set(const float (&x)[N]) { assign(x, S{}); }

 private:
  INTERNVIT_DEVICE float element(int i, float) const { return __uint_as_float(words[i]); }
  template <class Half>
  INTERNVIT_DEVICE float element(int i, Half) const {
    return widened(Half{uint16_t(words[i / 2] >> 16 * (i % 2))});
  }
  INTERNVIT_DEVICE void assign(const float (&x)[N], float) {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = __float_as_uint(x[i]);
  }
  template <class Half>
  INTERNVIT_DEVICE void assign(const float (&x)[N], Half half) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = packed(x[2 * i], x[2 * i + 1], half);
  }
};

// The first `count` of N elements at p, 0 for the rest; aligned chunks are there whole or not at all.
template <bool kAligned, int N, class S>
INTERNVIT_DEVICE Chunk<S, N> load(const S* p, int count) {
  Chunk<S, N> chunk = {};
  if constexpr (kAligned) {
    if (count > 0) {
      if constexpr (chunk.kWords == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(p);
        chunk.words[0] = x.x;
        chunk.words[1] = x.y;
      } else {
#pragma unroll
        for (int w = 0; w < chunk.kWords; w += 4) {
          const uint4 x = reinterpret_cast<const uint4*>(p)[w / 4];
          chunk.words[w] = x.x;
          chunk.words[w + 1] = x.y;
          chunk.words[w + 2] = x.z;
          chunk.words[w + 3] = x.w;
        }
      }
    }
  } else if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) chunk.words[i] = __float_as_uint(p[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) chunk.words[i / 2] |= uint32_t(p[i].bits) << 16 * (i % 2);
  }
  return chunk;
}

template <bool kAligned, int N, class S>
INTERNVIT_DEVICE void store(S* p, const Chunk<S, N>& chunk, int count) {
  if constexpr (kAligned) {
    if (count > 0) {
      if constexpr (chunk.kWords == 2) {
        *reinterpret_cast<uint2*>(p) = make_uint2(chunk.words[0], chunk.words[1]);
      } else {
#pragma unroll
        for (int w = 0; w < chunk.kWords; w += 4)
          reinterpret_cast<uint4*>(p)[w / 4] =
              make_uint4(chunk.words[w], chunk.words[w + 1], chunk.words[w + 2], chunk.words[w + 3]);
      }
    }
  } else if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = __uint_as_float(chunk.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i].bits = uint16_t(chunk.words[i / 2] >> 16 * (i % 2));
  }
}

// N elements of a parameter in T or float32 from column c on; `absent` without one.
template <bool kAligned, class T, int N>
INTERNVIT_DEVICE void load_parameter(const Parameter& parameter, int c, int count, float absent, float (&x)[N]) {
  if (!parameter.data) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = absent;
  } else if (sizeof(T) == 4 || parameter.is_float32) {
    const Chunk<float, N> chunk = load<kAligned, N>(static_cast<const float*>(parameter.data) + c, count);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = chunk[i];
  } else {
    const Chunk<T, N> chunk = load<kAligned, N>(static_cast<const T*>(parameter.data) + c, count);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = chunk[i];
  }
}

// x as S stores it.
template <class S>
INTERNVIT_DEVICE float rounded(float x) {
  if constexpr (sizeof(S) == 4) {
    return x;
  } else {
    return widened(S{uint16_t(packed(x, 0.0f, S{}))});
  }
}

// Column and number of elements of this lane's vector v.
template <int W>
struct Column {
  int c, count;
  INTERNVIT_DEVICE Column(int v, int channels)
      : c((v * int(blockDim.x) + int(threadIdx.x)) * W), count(channels - c < W ? channels - c : W) {}
};

// This lane's values of a row in float32, 0 beyond its end; all are loaded before the first is converted.
template <bool kAligned, class S, int V, int W>
INTERNVIT_DEVICE void load_row(const S* row, int channels, float (&x)[V][W]) {
  Chunk<S, W> chunks[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Column<W> column(v, channels);
    chunks[v] = load<kAligned, W>(row + column.c, column.count);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < W; ++i) x[v][i] = chunks[v][i];
  }
}

// Where the groups of a block leave their sums. Reductions take turns with the two halves: a thread that is late in
// reading one sum is not overtaken by the next, and by the one after that the barrier between has waited for it.
template <int N>
struct GroupSums {
  Shared<float> part[2][kMaxThreads / 16][N];
};

struct Add {
  INTERNVIT_DEVICE static float of(float a, float b) { return a + b; }
};
struct Max {
  INTERNVIT_DEVICE static float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces N numbers over the lanes of each row, from 0 on; every lane gets the same bits. All threads of a block call
// it, those of rows beyond the end as well.
template <class Operation, int N>
INTERNVIT_DEVICE void reduce_over_row(float (&x)[N], GroupSums<N>& sums, int turn) {
  const int lanes = int(blockDim.x), group = lanes % 32 ? 16 : 32;
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = Operation::of(x[n], __shfl_xor_sync(0xffffffffu, x[n], offset));
  }
  if (group == 32) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = Operation::of(x[n], __shfl_xor_sync(0xffffffffu, x[n], 16));
  }
  if (lanes == group) return;
  const int groups = lanes / group, first = int(threadIdx.y) * groups;
  if (threadIdx.x % unsigned(group) == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums.part[turn][first + int(threadIdx.x) / group][n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = 0.0f;
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = Operation::of(x[n], sums.part[turn][first + g][n]);
  }
}
template <int N>
INTERNVIT_DEVICE void sum_over_row(float (&x)[N], GroupSums<N>& sums, int turn) {
  reduce_over_row<Add>(x, sums, turn);
}
// Of numbers that are not negative.
template <int N>
INTERNVIT_DEVICE void max_over_row(float (&x)[N], GroupSums<N>& sums, int turn) {
  reduce_over_row<Max>(x, sums, turn);
}

}  // namespace internvit::cuda
