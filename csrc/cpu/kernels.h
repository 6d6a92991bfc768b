// What the bindings and the native driver know of the kernels: parameters, executor, one table of functions per
// instruction set. Plain data only: anything inline here would be compiled by four units with four sets of flags, and
// the linker would keep one of the copies for all.
#pragma once

#include "common/params.h"

namespace internvit {

// How a kernel runs in parallel and where it works: torch's pool in the library, anything in the native driver.
struct Executor {
  // Calls task(state, begin, end) over disjoint ranges that cover [0, n), each of at least `grain` but for the last.
  void (*parallel_for)(int64_t n, int64_t grain, void (*task)(void* state, int64_t begin, int64_t end), void* state);
  // `bytes` of this thread's own memory, 64-byte aligned, valid until the task returns; one call a task.
  void* (*scratch)(int64_t bytes);
  // `bytes` of the calling thread's memory for all tasks of a kernel, 64-byte aligned; one call a kernel.
  void* (*shared)(int64_t bytes);
};

using NormParams = NormParamsOf<const float*>;
using NormBackwardParams = NormBackwardParamsOf<const float*, float*>;

// q, k, v, out [B, N, H, D]: strides in elements for b, n, h; d is contiguous.
struct HeadsView {
  const void* data;
  int64_t stride_b, stride_n, stride_h;
};

// A batch of images, or with cu_seqlens packed sequences: B and b are then 1 and 0, N is the total of their tokens, and
// `tokens` and `keys` the longest ones. k, v and their gradients have `keys` tokens for N, and with cu_seqlens_k as
// many sequences of their own.
struct AttentionParams {
  DType dtype;
  HeadsView q, k, v;
  const float* q_weight;  // [H * D], all four or none
  const float* k_weight;
  const float* rstd_q;  // [B, N]
  const float* rstd_k;
  void* out;   // [B, N, H, D] contiguous
  float* lse;  // [B, H, N], natural logarithm
  int64_t batch, tokens, keys, heads, head_dim;
  int64_t row_stride;  // from head to head of lse
  float scale;
  const int32_t* cu_seqlens;    // [sequences + 1], from 0 to N, not decreasing; or null
  const int32_t* cu_seqlens_k;  // of keys, where they are not the queries'; or null
  int64_t sequences;
};

struct AttentionBackwardParams {
  DType dtype;
  HeadsView q, k, v, grad_out, out;
  const float* lse;  // lse and out: for the bf16 units alone
  const float* q_weight;
  const float* k_weight;
  const float* rstd_q;
  const float* rstd_k;
  HeadsView grad_q, grad_k, grad_v;  // written
  float* grad_q_weight_partial;      // [B or sequences, H * D], or null without weights
  float* grad_k_weight_partial;
  float* row_dot_q;  // [B, H, N]
  float* row_dot_k;
  int64_t batch, tokens, keys, heads, head_dim;
  int64_t row_stride;  // from head to head of lse and the row dots
  float scale;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_k;
  int64_t sequences;
};

struct AttentionColumnSumsParams {
  DType dtype;
  HeadsView q, k;
  const float* q_weight;
  const float* k_weight;
  const float* rstd_q;
  const float* rstd_k;
  const float* lse;                              // [B, H, N]
  float* sums;                                   // [B, H, N]
  int64_t batch, tokens, keys, heads, head_dim;  // as many keys as tokens
  int64_t row_stride;                            // from head to head of lse and sums
  float scale;
  const int32_t *cu_seqlens, *cu_seqlens_k;  // the latter is null
  int64_t sequences;
};

// y = epilogue(x W^T + bias), W packed once by pack_weight for this instruction set.
template <class T>
struct LinearParamsOf {
  const T* x;  // [rows, K]
  int64_t x_stride;
  const T* packed_weight;
  const float* bias;  // [M] or null
  const T* residual;  // [rows, M] or null: added in the epilogue
  int64_t residual_stride;
  T* y;  // [rows, M] contiguous
  int64_t rows, in_features, out_features;
  bool gelu;
};
using LinearParams = LinearParamsOf<bf16>;

template <class T>
struct PackWeightParamsOf {
  const T* weight;  // [M, K] contiguous
  T* packed;        // packed_weight_size(M, K) elements
  int64_t in_features, out_features;
};
using PackWeightParams = PackWeightParamsOf<bf16>;

// y = epilogue(x_scale * weight_scale * ((x_q - x_zero) W_q^T) + bias), W_q packed once by pack_weight_int8.
struct LinearInt8Params {
  const void* x;      // [rows, K] of x_dtype, quantised while it is packed; null with x_q
  const int8_t* x_q;  // [rows, K]
  int64_t x_stride;
  const float* x_scale;   // [rows], with x_q
  const int32_t* x_zero;  // [rows] or null for zeros
  const int8_t* packed_weight;
  const float* weight_scale;  // [M]
  const float* bias;          // [M] or null
  const void* residual;       // [rows, M] of dtype or null: added in the epilogue; not with gelu
  int64_t residual_stride;
  void* y;  // [rows, M] contiguous, bf16 or float32
  int64_t rows, in_features, out_features;
  DType dtype;  // of y
  DType x_dtype;
  bool gelu;
  bool grouped;  // packed_weight has ratios of groups
};

// y = fc2(gelu(fc1(x))): fc1 has no y, fc2 no x; fc1's gelu is set.
struct MlpInt8Params {
  LinearInt8Params fc1, fc2;
};

constexpr int64_t kInt8GroupSize = 128;  // of depth, where a weight has a scale for each group

struct PackWeightInt8Params {
  const int8_t* weight_q;    // [M, K] contiguous
  const float* group_ratio;  // [M, ceil(K / kInt8GroupSize)] contiguous: of each group's scale to weight_scale; or null
  int8_t* packed;            // packed_weight_int8_size(M, K, group_ratio != null) bytes
  int64_t in_features, out_features;
};

// What the machine could do at most, for benchmarks.
struct PeakParams {
  DType dtype;  // of the operands; float32 for what the unit multiplies in float32
  int64_t rounds;
  int64_t threads;
  int64_t* flops;  // [threads], done by each
};

struct Kernels {
  const char* name;
  int64_t weight_layout;  // of packed weights: a unit reads those of its own
  void (*norm)(const NormParams&, const Executor&);
  void (*norm_backward)(const NormBackwardParams&, const Executor&);
  void (*qk_norm_stats_backward)(const QKNormStatsBackwardParams&, const Executor&);
  void (*gelu)(const GeluParams&, const Executor&);  // with grad_y: its derivative
  void (*quantize_rows)(const QuantizeRowsParams&, const Executor&);
  void (*attention)(const AttentionParams&, const Executor&);
  void (*attention_backward)(const AttentionBackwardParams&, const Executor&);
  void (*attention_column_sums)(const AttentionColumnSumsParams&, const Executor&);
  // Null without AVX2, those of float32 with AVX-512 as well; torch's is used then.
  void (*pack_weight)(const PackWeightParams&, const Executor&);
  void (*linear)(const LinearParams&, const Executor&);
  void (*pack_weight_float32)(const PackWeightParamsOf<float>&, const Executor&);
  void (*linear_float32)(const LinearParamsOf<float>&, const Executor&);
  // Null without AVX2, and with AVX-512 but not VNNI.
  void (*pack_weight_int8)(const PackWeightInt8Params&, const Executor&);
  void (*linear_int8)(const LinearInt8Params&, const Executor&);
  void (*mlp_int8)(const MlpInt8Params&, const Executor&);
  void (*peak)(const PeakParams&, const Executor&);
};

extern const Kernels kGenericKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

// The units that this library has and this machine can run, worst first, ended by null; asked of CPUID, XCR0 and (AMX)
// the kernel's permission.
const Kernels* const* supported_kernels();

int64_t norm_backward_chunks(int64_t rows);
int64_t packed_weight_size(int64_t out_features, int64_t in_features);
int64_t packed_weight_int8_size(int64_t out_features, int64_t in_features, bool grouped);

}  // namespace internvit
