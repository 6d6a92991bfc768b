// Loops over a row's vectors and over rows, and the choice of a storage type.
#pragma once

#include "cpu/simd/simd.h"

namespace internvit::INTERNVIT_ISA {

// Calls body(begin, end) over ranges of [0, n).
template <class Body>
void parallel(const Executor& executor, int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  executor.parallel_for(
      n, grain, [](void* state, int64_t begin, int64_t end) { (*static_cast<const Body*>(state))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many lanes of a vector a row still fills.
struct AllLanes {};
struct SomeLanes {
  int64_t n;
};
template <class T>
INTERNVIT_INLINE Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
INTERNVIT_INLINE Vec load(const T* p, SomeLanes lanes) {
  return load(p, lanes.n);
}
template <class T>
INTERNVIT_INLINE void store(T* p, Vec x, AllLanes) {
  store(p, x);
}
template <class T>
INTERNVIT_INLINE void store(T* p, Vec x, SomeLanes lanes) {
  store(p, x, lanes.n);
}

// Calls body(c, lanes, u) for each vector of [0, n), u counting 0 to 3: a sum keeps four accumulators, which hides the
// latency of the addition and halves the rounding error of one.
template <class Body>
INTERNVIT_INLINE void for_lanes(int64_t n, Body body) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
    body(c, AllLanes{}, 0);
    body(c + kLanes, AllLanes{}, 1);
    body(c + 2 * kLanes, AllLanes{}, 2);
    body(c + 3 * kLanes, AllLanes{}, 3);
  }
  for (; c + kLanes <= n; c += kLanes) body(c, AllLanes{}, 0);
#else
  const int64_t fours = n / (4 * kLanes) * (4 * kLanes);
  for (; c + kLanes <= n; c += kLanes) body(c, AllLanes{}, c < fours ? int(c / kLanes % 4) : 0);
#endif
  if (c < n) body(c, SomeLanes{n - c}, 1);
}
#define INTERNVIT_BODY(c, lanes, u) [&](int64_t c, auto lanes, int u) __attribute__((always_inline))

struct Sum {
  Vec part[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  INTERNVIT_INLINE float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// Runs the body with T naming the storage type.
#define INTERNVIT_DISPATCH(dtype, T, ...) \
  do {                                    \
    if ((dtype) == kFloat32) {            \
      using T = float;                    \
      __VA_ARGS__;                        \
    } else if ((dtype) == kBFloat16) {    \
      using T = bf16;                     \
      __VA_ARGS__;                        \
    } else {                              \
      using T = f16;                      \
      __VA_ARGS__;                        \
    }                                     \
  } while (false)

// Rows a thread should have before another one pays: 16K elements are about 2 us of work.
INTERNVIT_INLINE int64_t row_grain(int64_t channels) { return channels < 16384 ? 16384 / channels : 1; }

}  // namespace internvit::INTERNVIT_ISA
