// The gradient that flows through the statistics of QK-norm, added in place (the statistics themselves: norm.h).
//
//   grad_x -= grad_rstd * rstd^3 / C * x
#pragma once

#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

template <class T>
void qk_norm_stats_backward_rows(const QKNormStatsBackwardParams& p, const Executor& executor) {
  parallel(executor, p.rows, row_grain(p.channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* grad_x = static_cast<T*>(p.grad_x) + row * p.grad_x_stride;
      const double rstd = p.rstd[row];
      const Vec slope = broadcast(float(-double(p.grad_rstd[row]) * rstd * rstd * rstd / double(p.channels)));
      for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
        store(grad_x + c, fma(slope, load(x + c, lanes), load(grad_x + c, lanes)), lanes);
      });
    }
  });
}

void qk_norm_stats_backward(const QKNormStatsBackwardParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, qk_norm_stats_backward_rows<T>(p, executor));
}

}  // namespace internvit::INTERNVIT_ISA
