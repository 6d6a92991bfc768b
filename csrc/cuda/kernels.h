// What the bindings and the host harness know of the CUDA kernels: parameters, and one table of launches per pair of
// dtypes. Plain data without CUDA or torch: a launch returns nullptr, or the reason why the device refused it.
#pragma once

#include <initializer_list>

#include "common/params.h"

namespace internvit::cuda {

constexpr int64_t kMaxChannels = 8192;  // of a row in registers: 256 threads of 32 elements
constexpr int kMaxJobs = 2;             // q and k in one launch

// A vector [C] of a model: in the activations' dtype or in float32, so that no launch has to convert it first.
struct Parameter {
  const void* data;  // null: absent
  bool is_float32;
};

// A gradient of a parameter.
struct ParameterGrad {
  void* data;  // null: not asked for
  bool is_float32;
};

using NormParams = NormParamsOf<Parameter>;
using NormBackwardParams = NormBackwardParamsOf<Parameter, ParameterGrad>;

// A kernel's argument: what block (., j) works on is job[j].
template <class Params>
struct Jobs {
  Params job[kMaxJobs];
  int count;
};

struct Kernels {
  const char* (*norm)(const Jobs<NormParams>&, void* stream);
  const char* (*norm_quantized)(const Jobs<NormParams>&, void* stream);
  const char* (*norm_backward)(const Jobs<NormBackwardParams>&, void* stream);
  int (*norm_backward_blocks)(int64_t channels);  // that a multiprocessor of the current device holds; 0: none known
  // Null for a float32 residual beside 16-bit activations: these know no residual.
  const char* (*quantize_rows)(const QuantizeRowsParams&, void* stream);
  const char* (*qk_norm_stats_backward)(const Jobs<QKNormStatsBackwardParams>&, void* stream);
  const char* (*gelu)(const GeluParams&, void* stream);  // with grad_y: its derivative
};

extern const Kernels kFloat32Kernels;
extern const Kernels kBFloat16Kernels;
extern const Kernels kBFloat16WithFloat32ResidualKernels;
extern const Kernels kFloat16Kernels;
extern const Kernels kFloat16WithFloat32ResidualKernels;

inline const Kernels& kernels_of(DType dtype, DType residual_dtype) {
  if (dtype == kFloat32) return kFloat32Kernels;
  const bool wide = residual_dtype == kFloat32;
  if (dtype == kBFloat16) return wide ? kBFloat16WithFloat32ResidualKernels : kBFloat16Kernels;
  return wide ? kFloat16WithFloat32ResidualKernels : kFloat16Kernels;
}

// The blocks of norm_backward that a multiprocessor of the current device holds, whichever kernel it is: the least over
// dtypes of the branch, norms and alignments. So their number, and with it the order of the sums over rows, depends on
// the width, the residual's dtype and the device alone: the fused op has the bits of its parts.
inline int resident_blocks(DType residual_dtype, int64_t channels) {
  int least = kernels_of(residual_dtype, residual_dtype).norm_backward_blocks(channels);
  if (residual_dtype == kFloat32) {
    for (const DType dtype : {kBFloat16, kFloat16}) {
      const int blocks = kernels_of(dtype, kFloat32).norm_backward_blocks(channels);
      least = blocks < least ? blocks : least;
    }
  }
  return least > 0 ? least : 1;
}

}  // namespace internvit::cuda
