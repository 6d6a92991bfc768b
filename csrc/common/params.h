// The parameters of the ops that CPUs and GPUs both have. Plain data, without torch: rows have a stride in elements,
// the rest is contiguous. `Parameter` is a vector [C] of the model, and `ParameterGrad` its gradient; a null pointer
// means that there is none. A CPU kernel reads float32 alone, a GPU kernel the model's own dtype as well
// (cuda/kernels.h).
//
// The dtypes come last: in front of the pointers they cost norm_kernel on sm_80 two registers, and with them a spill.
#pragma once

#include "common/types.h"

namespace internvit {

// Rows as int8 or float8 with a scale and a zero point each: x = x_scale * (x_q - x_zero).
struct QuantizedRows {
  void* x_q;        // [rows, C] contiguous; null: not asked for
  float* x_scale;   // [rows]
  int32_t* x_zero;  // [rows]
  DType dtype;      // int8 or float8_e4m3fn
  bool symmetric;
};

// Every norm, QK-norm, their statistics, and layer_scale_residual.
template <class Parameter>
struct NormParamsOf {
  const void* x;  // [rows, C]; the branch where there is a residual
  int64_t x_stride;
  const void* residual;  // [rows, C], null: the norm is of x
  int64_t residual_stride;
  Parameter gamma;
  const float* row_scale;  // [rows / rows_per_image] or null
  int64_t rows_per_image;
  Parameter weight;
  Parameter bias;
  void* residual_out;  // [rows, C]
  void* normed;        // [rows, C], null: statistics only, or quantised
  float* mean;         // [rows], null for RMSNorm
  float* rstd;         // [rows]; null without quantised rows: stop after residual_out
  int64_t rows;
  int32_t channels;
  float eps;
  bool layer_norm;
  bool round_before_weight;  // rounding="reference"
  QuantizedRows quantized;   // the normed rows, in the place of `normed`
  DType dtype;               // of x (or branch) and normed
  DType residual_dtype;      // of residual and residual_out
};

enum ParameterKind { kGamma = 0, kWeight = 1, kBias = 2, kParameterKinds = 3 };

// Their backward. Sums over rows go through `partial`, the same number of its rows for any number of threads.
template <class Parameter, class ParameterGrad>
struct NormBackwardParamsOf {
  const void* grad_normed;
  int64_t grad_normed_stride;
  const void* grad_residual_out;  // or null
  int64_t grad_residual_out_stride;
  const void* x;  // what was normalised
  int64_t x_stride;
  const void* branch;  // null unless gamma's gradient is asked for
  int64_t branch_stride;
  Parameter gamma;
  const float* row_scale;
  int64_t rows_per_image;
  Parameter weight;   // null: no norm, the gradient is grad_residual_out
  const float* mean;  // null for RMSNorm
  const float* rstd;
  void* grad_residual;                   // [rows, C] or null
  void* grad_branch;                     // [rows, C] or null
  ParameterGrad grads[kParameterKinds];  // [C] each, or null
  float* partial;                        // [partial_rows, 3, C]
  int64_t rows;
  int32_t channels;
  int32_t partial_rows;
  DType dtype;           // of grad_normed, branch and grad_branch
  DType residual_dtype;  // of x, grad_residual_out and grad_residual
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
  DType dtype;
};

struct QuantizeRowsParams {
  const void* x;  // [rows, C]
  int64_t x_stride;
  QuantizedRows quantized;
  int64_t rows;
  int32_t channels;
  DType dtype;  // of x
  bool gelu;    // of x's GELU
};

struct GeluParams {
  const void* pre_activation;
  const void* grad_y;  // backward only
  void* y;             // or the gradient
  int64_t size;
  DType dtype;
};

}  // namespace internvit
