// The raw ops torch.ops.internvit_cuda.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// No other folder of csrc/cuda knows torch. Schemas come from internvit/ops (setup.py writes schemas.h).
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/op_checks.h"
#include "cuda/torch/arguments.h"
#include "cuda/torch/backward.h"
#include "cuda/torch/stream.h"
#include "schemas.h"

#ifndef INTERNVIT_LIBRARY  // the host harness (tests/proofs/native) builds these ops for CPU tensors, under a name of
                           // its own
#define INTERNVIT_LIBRARY internvit_cuda
#define INTERNVIT_DEVICE_KEY CUDA
#endif
#define INTERNVIT_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define INTERNVIT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace internvit::cuda {
namespace {

// ---- norms ----------------------------------------------------------------------------------------------------------

NormParams norm_params(const char* op, const Rows& x, ScalarType dtype, double eps) {
  check_channels(op, x.channels);
  NormParams p = {};
  p.dtype = p.residual_dtype = dtype_of(dtype);
  p.x = x.data;
  p.x_stride = x.stride;
  p.rows = x.rows;
  p.channels = int32_t(x.channels);
  p.eps = float(eps);
  p.rows_per_image = 1;
  return p;
}

void run_norm(const char* op, const Tensor& x, const Jobs<NormParams>& jobs) {
  const NormParams& first = jobs.job[0];
  if (first.rows == 0) return;
  const CurrentStream stream(x);
  check_launched(op, kernels_of(first.dtype, first.residual_dtype).norm(jobs, stream.get()));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& rounding) {
  check::rms_norm(x, weight, eps, rounding);
  const Rows rows(x);
  const Vector w(weight, x.scalar_type());
  Tensor y = empty_like_of(x, x.scalar_type()), rstd = empty_floats(x, leading_sizes(x));
  NormParams p = norm_params("rms_norm", rows, x.scalar_type(), eps);
  p.weight = w.parameter;
  p.normed = y.data_ptr();
  p.rstd = floats(rstd);
  p.round_before_weight = rounding == "reference";
  run_norm("rms_norm", x, {{p}, 1});
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              double eps) {
  check::layer_norm(x, weight, bias, eps);
  const Rows rows(x);
  const Vector w(weight, x.scalar_type()), b(bias, x.scalar_type());
  Tensor y = empty_like_of(x, x.scalar_type());
  Tensor mean = empty_floats(x, leading_sizes(x)), rstd = empty_floats(x, leading_sizes(x));
  NormParams p = norm_params("layer_norm", rows, x.scalar_type(), eps);
  p.weight = w.parameter;
  p.bias = b.parameter;
  p.normed = y.data_ptr();
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.layer_norm = true;
  run_norm("layer_norm", x, {{p}, 1});
  return {y, mean, rstd};
}

struct FusedAdd {  // residual + row_scale * gamma * branch
  Rows residual, branch;
  Vector gamma;
  Floats row_scale;
  Tensor out;
  NormParams params;
  FusedAdd(const char* op, const Tensor& r, const Tensor& b, const OptionalTensor& g, const OptionalTensor& s,
           double eps)
      : residual(r),
        branch(b),
        gamma(g, b.scalar_type()),
        row_scale(s),
        out(empty_like_of(r, r.scalar_type())),
        params(norm_params(op, branch, b.scalar_type(), eps)) {
    params.residual_dtype = dtype_of(r.scalar_type());
    params.residual = residual.data;
    params.residual_stride = residual.stride;
    params.gamma = gamma.parameter;
    params.row_scale = row_scale.data;
    params.rows_per_image = rows_per_image(r, residual.rows);
    params.residual_out = out.data_ptr();
  }
};

Tensor layer_scale_residual(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                            const OptionalTensor& row_scale) {
  check::layer_scale_residual(residual, branch, gamma, row_scale);
  FusedAdd fused("layer_scale_residual", residual, branch, gamma, row_scale, 0);
  run_norm("layer_scale_residual", branch, {{fused.params}, 1});
  return fused.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm(const Tensor& residual, const Tensor& branch,
                                                                     const OptionalTensor& gamma,
                                                                     const OptionalTensor& row_scale,
                                                                     const Tensor& weight, const OptionalTensor& bias,
                                                                     double eps, const std::string& norm_type,
                                                                     const std::string& rounding) {
  check::layer_scale_residual_norm(residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding);
  const char* op = "layer_scale_residual_norm";
  FusedAdd fused(op, residual, branch, gamma, row_scale, eps);
  const Vector w(weight, branch.scalar_type()), b(bias, branch.scalar_type());
  const bool layer_norm = norm_type == "layer_norm";
  Tensor normed = empty_like_of(branch, branch.scalar_type());
  Tensor mean = empty_floats(residual, layer_norm ? leading_sizes(residual) : std::vector<int64_t>{0});
  Tensor rstd = empty_floats(residual, leading_sizes(residual));
  NormParams& p = fused.params;
  p.weight = w.parameter;
  p.bias = b.parameter;
  p.normed = normed.data_ptr();
  p.mean = layer_norm ? floats(mean) : nullptr;
  p.rstd = floats(rstd);
  p.layer_norm = layer_norm;
  p.round_before_weight = rounding == "reference" && !layer_norm;
  run_norm(op, branch, {{p}, 1});
  return {fused.out, normed, mean, rstd};
}

// ---- their backward -------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, const std::vector<bool>& mask) {
  check::rms_norm_backward(grad_y, x, weight, rstd, mask);
  Backward backward(
      "rms_norm_backward",
      {{}, grad_y, x, {}, {}, {}, weight, {}, rstd, x.scalar_type(), {mask[0], false, false, mask[1], false}});
  run_backward("rms_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad(kWeight)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const std::vector<bool>& mask) {
  check::layer_norm_backward(grad_y, x, weight, mean, rstd, mask);
  Backward backward(
      "layer_norm_backward",
      {{}, grad_y, x, {}, {}, {}, weight, mean, rstd, x.scalar_type(), {mask[0], false, false, mask[1], mask[2]}});
  run_backward("layer_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad(kWeight), backward.grad(kBias)};
}

std::tuple<Tensor, Tensor> layer_scale_residual_backward(const Tensor& grad_residual_out, const OptionalTensor& branch,
                                                         const OptionalTensor& gamma, const OptionalTensor& row_scale,
                                                         ScalarType branch_dtype, const std::vector<bool>& mask) {
  check::layer_scale_residual_backward(grad_residual_out, branch, gamma, row_scale, branch_dtype, mask);
  Backward backward("layer_scale_residual_backward", {grad_residual_out,
                                                      {},
                                                      {},
                                                      branch,
                                                      gamma,
                                                      row_scale,
                                                      {},
                                                      {},
                                                      {},
                                                      branch_dtype,
                                                      {false, mask[0], mask[1], false, false}});
  run_backward("layer_scale_residual_backward", {&backward});
  return {backward.grad_branch, backward.grad(kGamma)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_backward(
    const OptionalTensor& grad_residual_out, const Tensor& grad_normed, const Tensor& residual_out,
    const OptionalTensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const std::string& norm_type, const std::vector<bool>& mask) {
  check::layer_scale_residual_norm_backward(grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale,
                                            weight, mean, rstd, norm_type, mask);
  const OptionalTensor used_mean = norm_type == "layer_norm" ? OptionalTensor(mean) : OptionalTensor();
  Backward backward("layer_scale_residual_norm_backward",
                    {grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, used_mean, rstd,
                     grad_normed.scalar_type(), mask});
  run_backward("layer_scale_residual_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad_branch, backward.grad(kGamma), backward.grad(kWeight),
          backward.grad(kBias)};
}

// ---- QK-norm: q and k in one launch ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> qk_norm_stats(const Tensor& q, const Tensor& k, double eps) {
  check::qk_norm_stats(q, k, eps);
  const Rows q_rows(q, 2), k_rows(k, 2);
  Tensor rstd_q = empty_floats(q, leading_sizes(q, 2)), rstd_k = empty_floats(k, leading_sizes(k, 2));
  NormParams for_q = norm_params("qk_norm_stats", q_rows, q.scalar_type(), eps),
             for_k = norm_params("qk_norm_stats", k_rows, q.scalar_type(), eps);
  for_q.rstd = floats(rstd_q);
  for_k.rstd = floats(rstd_k);
  run_norm("qk_norm_stats", q, {{for_q, for_k}, 2});
  return {rstd_q, rstd_k};
}

void qk_norm_stats_backward(const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q, const Tensor& k,
                            const Tensor& rstd_q, const Tensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k) {
  check::qk_norm_stats_backward(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k);
  const char* op = "qk_norm_stats_backward";
  const Rows x[] = {Rows(q, 2), Rows(k, 2)}, out[] = {Rows(grad_q, 2), Rows(grad_k, 2)};
  const int64_t rows = x[0].rows;
  const Floats slope[] = {Floats{grad_rstd_q}, Floats{grad_rstd_k}}, rstd[] = {Floats{rstd_q}, Floats{rstd_k}};
  const Tensor* targets[] = {&grad_q, &grad_k};
  const DType dtype = dtype_of(q.scalar_type());
  Jobs<QKNormStatsBackwardParams> jobs = {{}, 2};
  for (int j = 0; j < 2; ++j)
    jobs.job[j] = {slope[j].data, rstd[j].data,           x[j].data, x[j].stride, out[j].data, out[j].stride,
                   rows,          int32_t(x[0].channels), dtype};
  check_channels(op, x[0].channels);
  if (rows == 0) return;
  const CurrentStream stream(q);
  check_launched(op, kernels_of(dtype, dtype).qk_norm_stats_backward(jobs, stream.get()));
  for (int j = 0; j < 2; ++j) {
    Tensor target = *targets[j];
    if (out[j].copied) torch::stable::copy_(target, out[j].kept);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                   const Tensor& k_weight, double eps, const std::string& rounding) {
  check::qk_norm(q, k, q_weight, k_weight, eps, rounding);
  const Tensor x[] = {q, k}, weights[] = {q_weight, k_weight};
  const Rows rows[] = {Rows(q, 2), Rows(k, 2)};
  const Vector w[] = {{q_weight, q.scalar_type()}, {k_weight, q.scalar_type()}};
  Tensor normed[2], rstd[2];
  Jobs<NormParams> jobs = {{}, 2};
  for (int j = 0; j < 2; ++j) {
    normed[j] = empty_like_of(x[j], x[j].scalar_type());
    rstd[j] = empty_floats(x[j], leading_sizes(x[j], 2));
    NormParams& p = jobs.job[j] = norm_params("qk_norm", rows[j], q.scalar_type(), eps);
    p.weight = w[j].parameter;
    p.normed = normed[j].data_ptr();
    p.rstd = floats(rstd[j]);
    p.round_before_weight = rounding == "reference";
  }
  run_norm("qk_norm", q, jobs);
  return {normed[0], normed[1], rstd[0], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& grad_q_normed, const Tensor& grad_k_normed,
                                                            const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                            const Tensor& k_weight, const Tensor& rstd_q,
                                                            const Tensor& rstd_k, const std::vector<bool>& mask) {
  check::qk_norm_backward(grad_q_normed, grad_k_normed, q, k, q_weight, k_weight, rstd_q, rstd_k, mask);
  const char* op = "qk_norm_backward";
  Backward for_q(op, {{},
                      grad_q_normed,
                      q,
                      {},
                      {},
                      {},
                      q_weight,
                      {},
                      rstd_q,
                      q.scalar_type(),
                      {mask[0], false, false, mask[2], false},
                      2});
  Backward for_k(op, {{},
                      grad_k_normed,
                      k,
                      {},
                      {},
                      {},
                      k_weight,
                      {},
                      rstd_k,
                      k.scalar_type(),
                      {mask[1], false, false, mask[3], false},
                      2});
  run_backward(op, {&for_q, &for_k});
  return {for_q.grad_residual, for_k.grad_residual, for_q.grad(kWeight), for_k.grad(kWeight)};
}

// ---- GELU -----------------------------------------------------------------------------------------------------------

Tensor run_gelu(const char* op, const Tensor& pre_activation, const OptionalTensor& grad_y) {
  const Tensor z = torch::stable::contiguous(pre_activation);
  const Tensor grad = grad_y ? torch::stable::contiguous(*grad_y) : Tensor();
  Tensor y = empty_like_of(z, z.scalar_type());
  if (z.numel() == 0) return y;
  const CurrentStream stream(z);
  const DType dtype = dtype_of(z.scalar_type());
  const GeluParams p = {z.data_ptr(), grad_y ? grad.data_ptr() : nullptr, y.data_ptr(), z.numel(), dtype};
  check_launched(op, kernels_of(dtype, dtype).gelu(p, stream.get()));
  return y;
}

Tensor gelu(const Tensor& pre_activation) {
  check::gelu(pre_activation);
  return run_gelu("gelu", pre_activation, {});
}

Tensor gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) {
  check::gelu_backward(grad_y, pre_activation);
  return run_gelu("gelu_backward", pre_activation, grad_y);
}

}  // namespace
}  // namespace internvit::cuda

INTERNVIT_DEFINE(INTERNVIT_LIBRARY, m) {
  for (const char* schema : internvit::kSchemas) m.def(schema);
}

INTERNVIT_IMPLEMENT(INTERNVIT_LIBRARY, INTERNVIT_DEVICE_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&internvit::cuda::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&internvit::cuda::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&internvit::cuda::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&internvit::cuda::layer_norm_backward));
  m.impl("layer_scale_residual", TORCH_BOX(&internvit::cuda::layer_scale_residual));
  m.impl("layer_scale_residual_backward", TORCH_BOX(&internvit::cuda::layer_scale_residual_backward));
  m.impl("layer_scale_residual_norm", TORCH_BOX(&internvit::cuda::layer_scale_residual_norm));
  m.impl("layer_scale_residual_norm_backward", TORCH_BOX(&internvit::cuda::layer_scale_residual_norm_backward));
  m.impl("qk_norm_stats", TORCH_BOX(&internvit::cuda::qk_norm_stats));
  m.impl("qk_norm_stats_backward", TORCH_BOX(&internvit::cuda::qk_norm_stats_backward));
  m.impl("qk_norm", TORCH_BOX(&internvit::cuda::qk_norm));
  m.impl("qk_norm_backward", TORCH_BOX(&internvit::cuda::qk_norm_backward));
  m.impl("gelu", TORCH_BOX(&internvit::cuda::gelu));
  m.impl("gelu_backward", TORCH_BOX(&internvit::cuda::gelu_backward));
}
