// What every unit begins with: its namespace, its inlining, and bf16 and f16 one value at a time.
#pragma once

#include "cpu/kernels.h"

#ifndef INTERNVIT_ISA  // an editor that opens a header alone; each unit in cpu/isa names its own
#define INTERNVIT_ISA generic
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define INTERNVIT_AVX2_ALONE
#endif

namespace internvit::INTERNVIT_ISA {

#define INTERNVIT_INLINE inline __attribute__((always_inline))
// Of long functions. Without AVX2 a vector is four registers and an operation many instructions: inlined everywhere,
// and with loops unrolled (for_lanes), that unit took 51 s to compile instead of 18.
#if defined(__AVX2__)
#define INTERNVIT_INLINE_LONG INTERNVIT_INLINE
#else
#define INTERNVIT_INLINE_LONG __attribute__((noinline))
#endif

constexpr int64_t kLanes = 16;

INTERNVIT_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INTERNVIT_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

INTERNVIT_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
INTERNVIT_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

INTERNVIT_INLINE float to_float(float x) { return x; }
INTERNVIT_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
INTERNVIT_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = float(magnitude) * (1.0f / 16777216.0f);  // subnormal: a multiple of 2^-24
  return bits_to_float(sign | float_to_bits(tiny));
}

INTERNVIT_INLINE void from_float(float x, float* out) { *out = x; }
INTERNVIT_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(bits >> 16 | 0x40)
                                               : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INTERNVIT_INLINE void from_float(float x, f16* out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  } else if (magnitude >= 0x477ff000) {
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits
    out->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

}  // namespace internvit::INTERNVIT_ISA
