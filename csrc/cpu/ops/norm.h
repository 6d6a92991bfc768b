// The row kernels behind rms_norm, layer_norm, layer_scale_residual, layer_scale_residual_norm, qk_norm and those with
// a quantised output, forward:
//
//   residual_out = residual + row_scale[b] * gamma * x      where a residual is given; then x is residual_out
//   normed       = (x - mean) * rstd * weight + bias        where a weight is given; in float32 where it is quantised
//
// One body for all of them gives the fused op and its parts the same bits. A row is read from memory once and stays in
// L1 for the passes after: sum, squares, output.
#pragma once

#include "cpu/ops/quantize_rows.h"
#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

struct RowStatistics {
  float mean, rest, rstd;  // the mean is mean + rest: one float32 is too coarse where it is large beside the deviations
};

// Squares are taken of x / 64: rows of 1e18 would overflow their sum, and a power of two costs no accuracy.
constexpr float kShrink = 1.0f / 64;

// Below it eps does not hide the squares that float32 has no digits for, of |x| < 1e-19: those of x over the sum of |x|
// are taken instead, at the cost of one more pass.
constexpr float kLeastEps = 1e-29f, kMostShrink = 0x1p60f;

template <class T>
INTERNVIT_INLINE float shrink_of(const T* x, int64_t channels, float eps) {
  if (eps >= kLeastEps) return kShrink;
  Sum sizes;
  for_lanes(channels, INTERNVIT_BODY(c, lanes, u) { sizes.part[u] = sizes.part[u] + abs(load(x + c, lanes)); });
  const float inverse = 1.0f / sizes.total();
  return inverse < kMostShrink ? inverse : kMostShrink;
}

template <class T>
INTERNVIT_INLINE RowStatistics row_statistics(const T* x, int64_t channels, bool layer_norm, float eps) {
  const float count = float(channels), shrink_by = shrink_of(x, channels, eps);
  const Vec shrink = broadcast(shrink_by);
  RowStatistics s = {0, 0, 0};
  Sum squares;
  float variance;  // of x * shrink_by
  if (layer_norm) {
    Sum first, second;
    for_lanes(channels, INTERNVIT_BODY(c, lanes, u) { first.part[u] = first.part[u] + load(x + c, lanes); });
    // A pivot of 7 bits: x - pivot is exact for 16-bit x. With all 24 bits the same rounding error would repeat in
    // every element of a binade, and shift the mean by half an ulp of 1.
    s.mean = bits_to_float(float_to_bits(first.total() / count) & 0xfffe0000u);
    const Vec mean = broadcast(s.mean);
    const int64_t full = channels / kLanes * kLanes;
    for_lanes(full, INTERNVIT_BODY(c, lanes, u) {
      const Vec d = load(x + c, lanes) - mean, small = d * shrink;
      second.part[u] = second.part[u] + d;
      squares.part[u] = fma(small, small, squares.part[u]);
    });
    if (full < channels) {  // as a vector too: a compiler rounds products in scalar sums as it likes, for each T
      float deviations[kLanes] = {};
      for (int64_t c = full; c < channels; ++c) deviations[c - full] = to_float(x[c]) - s.mean;
      const Vec d = load(deviations), small = d * shrink;
      second.part[1] = second.part[1] + d;
      squares.part[1] = fma(small, small, squares.part[1]);
    }
    s.rest = second.total() / count;
    const float rest = s.rest * shrink_by;
    variance = squares.total() / count - rest * rest;
    variance = variance > 0 ? variance : 0;
  } else {
    for_lanes(channels, INTERNVIT_BODY(c, lanes, u) {
      const Vec small = load(x + c, lanes) * shrink;
      squares.part[u] = fma(small, small, squares.part[u]);
    });
    variance = squares.total() / count;
  }
  const double unshrink = 1.0 / (double(shrink_by) * double(shrink_by));
  s.rstd = float(1.0 / __builtin_sqrt(double(variance) * unshrink + double(eps)));
  return s;
}

template <class T, class R>
INTERNVIT_INLINE void add_branch(const NormParams& p, int64_t row) {
  const R* residual = static_cast<const R*>(p.residual) + row * p.residual_stride;
  const T* branch = static_cast<const T*>(p.x) + row * p.x_stride;
  R* out = static_cast<R*>(p.residual_out) + row * p.channels;
  const Vec row_scale = broadcast(p.row_scale ? p.row_scale[row / p.rows_per_image] : 1.0f);
  if (p.gamma) {
    for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
      const Vec scaled = load(branch + c, lanes) * load(p.gamma + c, lanes);
      store(out + c, fma(scaled, row_scale, load(residual + c, lanes)), lanes);
    });
  } else {
    for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
      store(out + c, fma(load(branch + c, lanes), row_scale, load(residual + c, lanes)), lanes);
    });
  }
}

template <class T, class R>
INTERNVIT_INLINE void normalize(const NormParams& p, const R* x, const RowStatistics& s, T* y) {
  const Vec mean = broadcast(s.mean), rest = broadcast(s.rest), rstd = broadcast(s.rstd);
  if (p.layer_norm) {
    for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
      const Vec x_hat = ((load(x + c, lanes) - mean) - rest) * rstd;
      const Vec shift = p.bias ? load(p.bias + c, lanes) : broadcast(0.0f);
      store(y + c, fma(x_hat, load(p.weight + c, lanes), shift), lanes);
    });
  } else if (p.round_before_weight) {
    for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
      store(y + c, rounded<R>(load(x + c, lanes) * rstd) * load(p.weight + c, lanes), lanes);
    });
  } else {
    for_lanes(p.channels, INTERNVIT_BODY(c, lanes, u) {
      store(y + c, (load(x + c, lanes) * rstd) * load(p.weight + c, lanes), lanes);
    });
  }
}

template <class T, class R>
void norm_rows(const NormParams& p, const Executor& executor) {
  const bool quantized = p.quantized.x_q != nullptr;
  parallel(executor, p.rows, row_grain(p.channels), [&](int64_t begin, int64_t end) {
    float* values = quantized ? static_cast<float*>(executor.scratch(p.channels * int64_t(sizeof(float)))) : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const R* x = static_cast<const R*>(p.x) + row * p.x_stride;
      if (p.residual) {
        add_branch<T, R>(p, row);
        x = static_cast<const R*>(p.residual_out) + row * p.channels;
      }
      if (!p.rstd && !quantized) continue;
      const RowStatistics s = row_statistics(x, p.channels, p.layer_norm, p.eps);
      if (quantized) {
        normalize<float, R>(p, x, s, values);
        quantize_row_into(p.quantized, row, values, p.channels);
        continue;
      }
      p.rstd[row] = s.rstd;
      if (p.mean) p.mean[row] = s.mean + s.rest;
      if (p.normed) normalize<T, R>(p, x, s, static_cast<T*>(p.normed) + row * p.channels);
    }
  });
}

void norm(const NormParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, {
    if (p.residual_dtype == p.dtype) {
      norm_rows<T, T>(p, executor);
    } else {
      norm_rows<T, float>(p, executor);
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
