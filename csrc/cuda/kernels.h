// What the bindings and the host harness know of the CUDA kernels: parameters, and one table of launches per pair of
// dtypes. Plain data without CUDA or torch: a launch returns nullptr, or the reason why the device refused it.
#pragma once

#include <cstdint>

namespace internvit::cuda {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t kMaxChannels = 8192;  // of a row in registers: 256 threads of 32 elements
constexpr int kMaxJobs = 2;             // q and k in one launch

// A vector [C] of a model: in the activations' dtype or in float32, so that no launch has to convert it first.
struct Parameter {
  const void* data;  // null: absent
  bool is_float32;
};

// rms_norm, layer_norm, layer_scale_residual, layer_scale_residual_norm, qk_norm_stats and qk_norm. Rows have a stride
// in elements; the rest is contiguous.
struct NormParams {
  const void* x;  // [rows, C]; the branch where there is a residual
  int64_t x_stride;
  const void* residual;  // [rows, C], null: the norm is of x
  int64_t residual_stride;
  Parameter gamma;
  const float* row_scale;  // [rows / rows_per_image] or null
  int64_t rows_per_image;
  Parameter weight;
  Parameter bias;
  void* residual_out;  // [rows, C], the residual's dtype
  void* normed;        // [rows, C], null: statistics only
  float* mean;         // [rows], null for RMSNorm
  float* rstd;         // [rows], null: stop after residual_out
  int64_t rows;
  int32_t channels;
  float eps;
  bool layer_norm;
  bool round_before_weight;  // rounding="reference"
};

// A gradient of a parameter, and its place in `partial`.
struct ParameterGrad {
  void* data;  // [C], null: not asked for
  bool is_float32;
};
enum GradKind { kGradGamma = 0, kGradWeight = 1, kGradBias = 2, kGradKinds = 3 };

// Their backward. `partial` [programs, 3, C]: a program (block) sums its rows in registers and writes one row of each.
struct NormBackwardParams {
  const void* grad_normed;
  int64_t grad_normed_stride;
  const void* grad_residual_out;  // or null
  int64_t grad_residual_out_stride;
  const void* x;  // what was normalised
  int64_t x_stride;
  const void* branch;  // null unless grad_gamma is wanted
  int64_t branch_stride;
  Parameter gamma;
  const float* row_scale;
  int64_t rows_per_image;
  Parameter weight;   // null: no norm, the gradient is grad_residual_out
  const float* mean;  // null for RMSNorm
  const float* rstd;
  void* grad_residual;  // [rows, C] or null
  void* grad_branch;    // [rows, C] or null
  ParameterGrad grads[kGradKinds];
  float* partial;
  int64_t rows;
  int32_t channels;
  int32_t programs;
};

struct QKNormStatsBackwardParams {
  const float* grad_rstd;  // [rows]
  const float* rstd;
  const void* x;  // [rows, C]
  int64_t x_stride;
  void* grad_x;  // [rows, C], added to
  int64_t grad_x_stride;
  int64_t rows;
  int32_t channels;
};

struct GeluParams {
  const void* pre_activation;
  const void* grad_y;  // backward only
  void* y;             // or the gradient
  int64_t size;
};

// A kernel's argument: what block (., j) works on is job[j].
template <class Params>
struct Jobs {
  Params job[kMaxJobs];
  int count;
};

struct Kernels {
  const char* (*norm)(const Jobs<NormParams>&, void* stream);
  const char* (*norm_backward)(const Jobs<NormBackwardParams>&, void* stream);
  // Null for a float32 residual beside 16-bit activations: these know no residual.
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

}  // namespace internvit::cuda
