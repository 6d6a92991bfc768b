// Sixteen float32 lanes in an array that the compiler splits into what the machine has.
#pragma once

#include "cpu/simd/scalar.h"

namespace internvit::INTERNVIT_ISA {

typedef float Lanes __attribute__((vector_size(64)));  // GCC and Clang split it into what the machine has
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

struct Vec {
  Lanes v;
};
INTERNVIT_INLINE Vec broadcast(float x) { return {Lanes{} + x}; }
INTERNVIT_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, 64);
  return x;
}
INTERNVIT_INLINE Vec load(const bf16* p) {
  HalfLanes bits;
  __builtin_memcpy(&bits, p, 32);
  return {(Lanes)(__builtin_convertvector(bits, BitLanes) << 16)};
}
INTERNVIT_INLINE_LONG void load_f16(const f16* p, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = to_float(p[i]);
}
INTERNVIT_INLINE_LONG void store_f16(f16* p, const float* x) {
  for (int i = 0; i < 16; ++i) from_float(x[i], p + i);
}
INTERNVIT_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, 64); }
INTERNVIT_INLINE Vec load(const f16* p) {
  float lanes[16];
  load_f16(p, lanes);
  return load(lanes);
}
INTERNVIT_INLINE_LONG void store(bf16* p, Vec x) {
  const BitLanes bits = (BitLanes)x.v, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = (BitLanes)(x.v != x.v);
  const HalfLanes halves = __builtin_convertvector(((nan & (bits | 0x400000)) | (~nan & rounded)) >> 16, HalfLanes);
  __builtin_memcpy(p, &halves, 32);
}
INTERNVIT_INLINE void store(f16* p, Vec x) {
  float lanes[16];
  store(lanes, x);
  store_f16(p, lanes);
}
INTERNVIT_INLINE Lanes choose(IntLanes condition, Lanes yes, Lanes no) {
  return (Lanes)((condition & (IntLanes)yes) | (~condition & (IntLanes)no));
}
INTERNVIT_INLINE Vec operator+(Vec x, Vec y) { return {x.v + y.v}; }
INTERNVIT_INLINE Vec operator-(Vec x, Vec y) { return {x.v - y.v}; }
INTERNVIT_INLINE Vec operator*(Vec x, Vec y) { return {x.v * y.v}; }
INTERNVIT_INLINE Vec operator/(Vec x, Vec y) { return {x.v / y.v}; }
INTERNVIT_INLINE Vec fma(Vec x, Vec y, Vec z) { return {x.v * y.v + z.v}; }
INTERNVIT_INLINE Vec max(Vec x, Vec y) { return {choose(x.v > y.v, x.v, y.v)}; }
INTERNVIT_INLINE Vec min(Vec x, Vec y) { return {choose(x.v < y.v, x.v, y.v)}; }
INTERNVIT_INLINE Vec abs(Vec x) { return {(Lanes)((BitLanes)x.v & 0x7fffffffu)}; }
INTERNVIT_INLINE Vec copy_sign(Vec x, Vec sign) {
  return {(Lanes)(((BitLanes)x.v & 0x7fffffffu) | ((BitLanes)sign.v & 0x80000000u))};
}
INTERNVIT_INLINE Vec floor(Vec x) {
  const IntLanes whole = ~(abs(x).v < Lanes{} + 8388608.0f);  // or NaN
  const Lanes inside = choose(whole, Lanes{}, x.v);           // converting what no int32 holds is undefined
  const Lanes truncated = __builtin_convertvector(__builtin_convertvector(inside, IntLanes), Lanes);
  return {choose(whole, x.v, truncated + __builtin_convertvector(truncated > inside, Lanes))};
}
INTERNVIT_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Vec exponent = min(broadcast(128.0f), max(broadcast(-127.0f), n));
  const Lanes known = choose(exponent.v == exponent.v, exponent.v, Lanes{});
  return {x.v * (Lanes)((__builtin_convertvector(known, IntLanes) + 127) << 23)};
}
INTERNVIT_INLINE Vec reciprocal(Vec x) { return broadcast(1.0f) / x; }
INTERNVIT_INLINE Vec reciprocal_estimate(Vec x) { return reciprocal(x); }

}  // namespace internvit::INTERNVIT_ISA
