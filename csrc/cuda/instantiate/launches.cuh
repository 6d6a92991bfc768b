// The launch of each kernel for activations T and residuals R, and with it the instantiation of every kernel: the
// vectors a thread may hold are listed in launch.h, and nowhere else.
#pragma once

#include <initializer_list>

#include "cuda/ops/gelu.cuh"
#include "cuda/ops/norm.cuh"
#include "cuda/ops/norm_backward.cuh"
#include "cuda/ops/qk_norm_stats.cuh"
#include "cuda/ops/quantize_rows.cuh"

namespace internvit::cuda {

template <int N>
struct Int {
  static constexpr int value = N;
};

template <class T, class R>
struct Launches {
  static constexpr int W = kWidth<R>;
  static constexpr int64_t kT = sizeof(T), kR = sizeof(R);

  template <class Params>
  static bool whole_vectors(const Params& p) {
    return p.channels % W == 0;
  }
  // Whether a vector of T is one access at p and every `stride` elements from there.
  static bool is_aligned_branch(const void* p, int64_t stride = 0) { return is_aligned(p, stride * kT, W * kT); }
  static bool is_aligned_parameter(const Parameter& parameter) { return is_aligned(parameter.data, 0); }

  static bool aligned(const NormParams& p) {
    const bool input = p.residual ? is_aligned_branch(p.x, p.x_stride) : is_aligned(p.x, p.x_stride * kR);
    return whole_vectors(p) && input && is_aligned(p.residual, p.residual_stride * kR) &&
           is_aligned(p.residual_out, 0) && is_aligned_branch(p.normed) && is_aligned_parameter(p.gamma) &&
           is_aligned_parameter(p.weight) && is_aligned_parameter(p.bias) && is_aligned(p.quantized.x_q, 0);
  }
  static bool aligned(const QuantizeRowsParams& p) {
    return whole_vectors(p) && is_aligned(p.x, p.x_stride * kT) && is_aligned(p.quantized.x_q, 0);
  }
  static bool aligned(const NormBackwardParams& p) {
    return whole_vectors(p) && is_aligned_branch(p.grad_normed, p.grad_normed_stride) &&
           is_aligned(p.grad_residual_out, p.grad_residual_out_stride * kR) && is_aligned(p.x, p.x_stride * kR) &&
           is_aligned_branch(p.branch, p.branch_stride) && is_aligned(p.grad_residual, 0) &&
           is_aligned_branch(p.grad_branch) && is_aligned(p.partial, 0) && is_aligned_parameter(p.gamma) &&
           is_aligned_parameter(p.weight);
  }
  static bool aligned(const QKNormStatsBackwardParams& p) {
    return whole_vectors(p) && is_aligned(p.x, p.x_stride * kT) && is_aligned(p.grad_x, p.grad_x_stride * kT);
  }
  template <class Params>
  static bool all_aligned(const Jobs<Params>& jobs) {
    bool all = true;
    for (int j = 0; j < jobs.count; ++j) all = all && aligned(jobs.job[j]);
    return all;
  }

  // Calls of<vectors>() with the number that the rule chose.
  template <class Of>
  static const char* with_vectors(int vectors, const Of& of) {
#define INTERNVIT_CASE(V) \
  case V:                 \
    return of(Int<V>{});
    if constexpr (W == 4) {
      switch (vectors) { INTERNVIT_VECTORS_32_BIT(INTERNVIT_CASE) }
    } else {
      switch (vectors) { INTERNVIT_VECTORS_16_BIT(INTERNVIT_CASE) }
    }
#undef INTERNVIT_CASE
    return "no kernel holds a row of so many channels";
  }

  static unsigned cdiv(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

  template <bool kQuantized, int V>
  static auto norm_kernel_of(bool wide) {
    if constexpr (kQuantized) {
      return wide ? norm_quantized_kernel<T, R, V, true> : norm_quantized_kernel<T, R, V, false>;
    } else {
      return wide ? norm_kernel<T, R, V, true> : norm_kernel<T, R, V, false>;
    }
  }

  template <bool kQuantized>
  static const char* norm(const Jobs<NormParams>& jobs, void* stream) {
    const NormParams& first = jobs.job[0];
    const RowLaunch rule = row_launch(first.channels, W);
    const dim3 grid(cdiv(first.rows, rule.rows), unsigned(jobs.count)),
        block(unsigned(rule.lanes), unsigned(rule.rows));
    return with_vectors(rule.vectors, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      return launch(norm_kernel_of<kQuantized, V>(all_aligned(jobs)), grid, block, stream, jobs);
    });
  }

  static const char* quantize_rows(const QuantizeRowsParams& p, void* stream) {
    const RowLaunch rule = row_launch(p.channels, W);
    const dim3 grid(cdiv(p.rows, rule.rows)), block(unsigned(rule.lanes), unsigned(rule.rows));
    return with_vectors(rule.vectors, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      return launch(aligned(p) ? quantize_rows_kernel<T, V, true> : quantize_rows_kernel<T, V, false>, grid, block,
                    stream, p);
    });
  }

  template <int V>
  static auto backward_kernel(bool wide, bool layer_norm) {
    return !wide        ? norm_backward_kernel<T, R, V, false, true>
           : layer_norm ? norm_backward_kernel<T, R, V, true, true>
                        : norm_backward_kernel<T, R, V, true, false>;
  }

  static int norm_backward_blocks(int64_t channels) {
    const RowLaunch rule = row_launch(channels, W);
    int least = kMaxThreads;
    with_vectors(rule.vectors, [&](auto vectors) -> const char* {
      constexpr int V = decltype(vectors)::value;
      for (const auto kernel :
           {backward_kernel<V>(false, true), backward_kernel<V>(true, false), backward_kernel<V>(true, true)}) {
        const int blocks = resident_blocks_of(kernel, rule.lanes * rule.rows);
        least = blocks < least ? blocks : least;
      }
      return nullptr;
    });
    return least;
  }

  static const char* norm_backward(const Jobs<NormBackwardParams>& jobs, void* stream) {
    const NormBackwardParams& first = jobs.job[0];
    const RowLaunch rule = row_launch(first.channels, W);
    const bool wide = all_aligned(jobs), is_layer_norm = first.mean || first.grads[kBias].data;
    const dim3 grid(unsigned(first.partial_rows), unsigned(jobs.count)),
        block(unsigned(rule.lanes), unsigned(rule.rows));
    const char* failed = with_vectors(rule.vectors, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const auto kernel = backward_kernel<V>(wide, is_layer_norm);
      return first.partial_rows ? launch(kernel, grid, block, stream, jobs) : nullptr;
    });
    bool sums = false;
    for (int j = 0; j < jobs.count; ++j)
      for (const ParameterGrad& grad : jobs.job[j].grads) sums = sums || grad.data;
    if (failed || !sums) return failed;
    const dim3 sum_grid(cdiv(first.channels, 4 * kSumColumns), kParameterKinds, unsigned(jobs.count));
    return launch(wide ? sum_partials_kernel<T, true> : sum_partials_kernel<T, false>, sum_grid,
                  dim3(kSumColumns, kSumSlices), stream, jobs);
  }

  static const char* qk_norm_stats_backward(const Jobs<QKNormStatsBackwardParams>& jobs, void* stream) {
    const QKNormStatsBackwardParams& first = jobs.job[0];
    const RowLaunch rule = row_launch(first.channels, W);
    const dim3 grid(cdiv(first.rows, rule.rows), unsigned(jobs.count)),
        block(unsigned(rule.lanes), unsigned(rule.rows));
    const auto kernel =
        all_aligned(jobs) ? qk_norm_stats_backward_kernel<T, true> : qk_norm_stats_backward_kernel<T, false>;
    return launch(kernel, grid, block, stream, jobs);
  }

  static const char* gelu(const GeluParams& p, void* stream) {
    const bool wide = is_aligned(p.pre_activation, 0) && is_aligned(p.grad_y, 0) && is_aligned(p.y, 0);
    const dim3 grid(cdiv(p.size, int64_t(kGeluThreads) * W));
    return launch(wide ? gelu_kernel<T, true> : gelu_kernel<T, false>, grid, dim3(kGeluThreads), stream, p);
  }

  // A residual of a dtype of its own is for the norms alone.
  static constexpr Kernels table() {
    Kernels kernels = {norm<false>, norm<true>, norm_backward, norm_backward_blocks, nullptr, nullptr, nullptr};
    if constexpr (sizeof(T) == sizeof(R)) {
      kernels.quantize_rows = quantize_rows;
      kernels.qk_norm_stats_backward = qk_norm_stats_backward;
      kernels.gelu = gelu;
    }
    return kernels;
  }
};

}  // namespace internvit::cuda
