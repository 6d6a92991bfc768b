// The normal distribution's tail, from which both libraries compute the exact GELU and its derivative:
//
//   gelu(z) = z Phi(z),  gelu'(z) = Phi(z) + z exp(-z^2 / 2) / sqrt(2 pi)
//   Phi(-a) = erfc(a / sqrt(2)) / 2 = exp(-a^2 / 2) R(1 / (1 + c a)) for a >= 0,  Phi(a) = 1 - Phi(-a)
//
// R is a polynomial fitted for the least relative error: 1e-8 for float32, 2e-6 for float16, 1e-5 for bfloat16. So the
// negative tail keeps its digits, which z (1 + erf) / 2 loses.
#pragma once

#include "common/types.h"

namespace internvit {

template <class T>
struct GeluFit;  // the coefficients r of R, highest first

template <>
struct GeluFit<float> {
  float c = 0.33f;
  float r[10] = {-0.0261072877f, 0.149803736f, -0.325071533f, 0.295118414f, -0.109551128f,
                 0.147302035f,   0.103260786f, 0.133769263f,  0.131468936f, 6.78320019e-06f};
};
template <>
struct GeluFit<f16> {
  float c = 0.30f;
  float r[7] = {-0.0845930932f, 0.240572196f, -0.0486433852f,  0.164763555f,
                0.10670497f,    0.121274595f, -7.97792693e-05f};
};
template <>
struct GeluFit<bf16> {
  float c = 0.36f;
  float r[6] = {-0.098516029f, 0.254388357f, 0.0351156186f, 0.168696081f, 0.140124017f, 1.912933e-4f};
};

}  // namespace internvit
