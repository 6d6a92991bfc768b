// The raw ops torch.ops.internvit_cuda.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// Only bindings.cpp and the headers it includes know torch. Arguments were validated in internvit/ops; checks here are a backstop.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../schemas.h"
#include "arguments.h"
#include "backward.h"
#include "stream.h"

#ifndef INTERNVIT_LIBRARY  // the host harness (tests/proofs/native) builds these ops for CPU tensors, under a name of its own
#define INTERNVIT_LIBRARY internvit_cuda
#define INTERNVIT_DEVICE_KEY CUDA
#endif
#define INTERNVIT_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define INTERNVIT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace internvit::cuda {
namespace {

// ---- norms ----------------------------------------------------------------------------------------------------------

NormParams norm_params(const char* op, const Rows& x, double eps) {
  check_channels(op, x.channels);
  NormParams p = {};
  p.x = x.data;
  p.x_stride = x.stride;
  p.rows = x.rows;
  p.channels = int32_t(x.channels);
  p.eps = float(eps);
  p.rows_per_image = 1;
  return p;
}

void run_norm(const char* op, const Tensor& x, DType dtype, DType residual_dtype, const Jobs<NormParams>& jobs) {
  if (jobs.job[0].rows == 0) return;
  const CurrentStream stream(x);
  check_launched(op, kernels_of(dtype, residual_dtype).norm(jobs, stream.get()));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& rounding) {
  const Rows rows(x);
  const DType dtype = dtype_of("rms_norm", "x", x);
  const Vector w("rms_norm", "weight", weight, x, rows.channels);
  Tensor y = empty_like_of(x, x.scalar_type()), rstd = empty_floats(x, leading_sizes(x));
  NormParams p = norm_params("rms_norm", rows, eps);
  p.weight = w.parameter;
  p.normed = y.data_ptr();
  p.rstd = floats(rstd);
  p.round_before_weight = rounding == "reference";
  run_norm("rms_norm", x, dtype, dtype, {{p}, 1});
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Maybe& bias, double eps) {
  const Rows rows(x);
  const DType dtype = dtype_of("layer_norm", "x", x);
  const Vector w("layer_norm", "weight", weight, x, rows.channels), b("layer_norm", "bias", bias, x, rows.channels);
  Tensor y = empty_like_of(x, x.scalar_type());
  Tensor mean = empty_floats(x, leading_sizes(x)), rstd = empty_floats(x, leading_sizes(x));
  NormParams p = norm_params("layer_norm", rows, eps);
  p.weight = w.parameter;
  p.bias = b.parameter;
  p.normed = y.data_ptr();
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.layer_norm = true;
  run_norm("layer_norm", x, dtype, dtype, {{p}, 1});
  return {y, mean, rstd};
}

struct Seam {  // residual + row_scale * gamma * branch
  Rows residual, branch;
  DType dtype, residual_dtype;
  Vector gamma;
  Statistics row_scale;
  Tensor out;
  NormParams params;
  Seam(const char* op, const Tensor& r, const Tensor& b, const Maybe& g, const Maybe& s, double eps)
      : residual(r), branch(b), dtype(dtype_of(op, "branch", b)), residual_dtype(dtype_of(op, "residual", r)),
        gamma(op, "gamma", g, b, branch.channels), row_scale(op, "row_scale", s, b, r.dim() ? r.size(0) : 1),
        out(empty_like_of(r, r.scalar_type())), params(norm_params(op, branch, eps)) {
    check_rows(op, "residual", residual, branch);
    check_same(op, "residual", r, b);
    if (residual_dtype != kFloat32) check_dtype(op, "residual", r, b.scalar_type());
    params.residual = residual.data;
    params.residual_stride = residual.stride;
    params.gamma = gamma.parameter;
    params.row_scale = row_scale.data;
    params.rows_per_image = rows_per_image(r, residual.rows);
    params.residual_out = out.data_ptr();
  }
};

Tensor layer_scale_residual(
    const Tensor& residual, const Tensor& branch, const Maybe& gamma, const Maybe& row_scale) {
  Seam seam("layer_scale_residual", residual, branch, gamma, row_scale, 0);
  run_norm("layer_scale_residual", branch, seam.dtype, seam.residual_dtype, {{seam.params}, 1});
  return seam.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm(
    const Tensor& residual, const Tensor& branch, const Maybe& gamma, const Maybe& row_scale, const Tensor& weight,
    const Maybe& bias, double eps, const std::string& kind, const std::string& rounding) {
  const char* op = "layer_scale_residual_norm";
  Seam seam(op, residual, branch, gamma, row_scale, eps);
  const Vector w(op, "weight", weight, branch, seam.branch.channels), b(op, "bias", bias, branch, seam.branch.channels);
  const bool layer_norm = kind == "layer_norm";
  Tensor normed = empty_like_of(branch, branch.scalar_type());
  Tensor mean = empty_floats(residual, layer_norm ? leading_sizes(residual) : std::vector<int64_t>{0});
  Tensor rstd = empty_floats(residual, leading_sizes(residual));
  NormParams& p = seam.params;
  p.weight = w.parameter;
  p.bias = b.parameter;
  p.normed = normed.data_ptr();
  p.mean = layer_norm ? floats(mean) : nullptr;
  p.rstd = floats(rstd);
  p.layer_norm = layer_norm;
  p.round_before_weight = rounding == "reference" && !layer_norm;
  run_norm(op, branch, seam.dtype, seam.residual_dtype, {{p}, 1});
  return {seam.out, normed, mean, rstd};
}

// ---- their backward -------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd, std::vector<bool> mask) {
  Backward backward("rms_norm_backward", {{}, grad_y, x, {}, {}, {}, weight, {}, rstd, x.scalar_type(),
                                          {mask[0], false, false, mask[1], false}});
  check_dtype("rms_norm_backward", "grad_y", grad_y, x.scalar_type());
  run_backward("rms_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad(kGradWeight)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    std::vector<bool> mask) {
  Backward backward("layer_norm_backward", {{}, grad_y, x, {}, {}, {}, weight, mean, rstd, x.scalar_type(),
                                            {mask[0], false, false, mask[1], mask[2]}});
  check_dtype("layer_norm_backward", "grad_y", grad_y, x.scalar_type());
  run_backward("layer_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad(kGradWeight), backward.grad(kGradBias)};
}

std::tuple<Tensor, Tensor> layer_scale_residual_backward(
    const Tensor& grad_out, const Maybe& branch, const Maybe& gamma, const Maybe& row_scale, ScalarType branch_dtype,
    std::vector<bool> mask) {
  Backward backward("layer_scale_residual_backward", {grad_out, {}, {}, branch, gamma, row_scale, {}, {}, {},
                                                      branch_dtype, {false, mask[0], mask[1], false, false}});
  run_backward("layer_scale_residual_backward", {&backward});
  return {backward.grad_branch, backward.grad(kGradGamma)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_backward(
    const Maybe& grad_residual_out, const Tensor& grad_normed, const Tensor& residual_out, const Maybe& branch,
    const Maybe& gamma, const Maybe& row_scale, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    const std::string& kind, std::vector<bool> mask) {
  const Maybe used_mean = kind == "layer_norm" ? Maybe(mean) : Maybe();
  Backward backward("layer_scale_residual_norm_backward",
                    {grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, used_mean, rstd,
                     grad_normed.scalar_type(), std::move(mask)});
  run_backward("layer_scale_residual_norm_backward", {&backward});
  return {backward.grad_residual, backward.grad_branch, backward.grad(kGradGamma), backward.grad(kGradWeight),
          backward.grad(kGradBias)};
}

// ---- QK-norm: q and k in one launch ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> qk_norm_stats(const Tensor& q, const Tensor& k, double eps) {
  const Rows q_rows(q, 2), k_rows(k, 2);
  check_rows("qk_norm_stats", "k", k_rows, q_rows);
  check_same("qk_norm_stats", "k", k, q);
  check_dtype("qk_norm_stats", "k", k, q.scalar_type());
  Tensor rstd_q = empty_floats(q, leading_sizes(q, 2)), rstd_k = empty_floats(k, leading_sizes(k, 2));
  NormParams for_q = norm_params("qk_norm_stats", q_rows, eps), for_k = norm_params("qk_norm_stats", k_rows, eps);
  for_q.rstd = floats(rstd_q);
  for_k.rstd = floats(rstd_k);
  const DType dtype = dtype_of("qk_norm_stats", "q", q);
  run_norm("qk_norm_stats", q, dtype, dtype, {{for_q, for_k}, 2});
  return {rstd_q, rstd_k};
}

void qk_norm_stats_backward(
    const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q, const Tensor& k, const Tensor& rstd_q,
    const Tensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k) {
  const char* op = "qk_norm_stats_backward";
  const Rows x[] = {Rows(q, 2), Rows(k, 2)}, out[] = {Rows(grad_q, 2), Rows(grad_k, 2)};
  const int64_t rows = x[0].rows;
  const Statistics slope[] = {{op, "grad_rstd_q", grad_rstd_q, q, rows}, {op, "grad_rstd_k", grad_rstd_k, q, rows}};
  const Statistics rstd[] = {{op, "rstd_q", rstd_q, q, rows}, {op, "rstd_k", rstd_k, q, rows}};
  const Tensor* tensors[] = {&q, &k, &grad_q, &grad_k};
  const char* names[] = {"q", "k", "grad_q", "grad_k"};
  Jobs<QKNormStatsBackwardParams> jobs = {{}, 2};
  for (int i = 0; i < 4; ++i) {
    check_same(op, names[i], *tensors[i], q);
    check_dtype(op, names[i], *tensors[i], q.scalar_type());
    check_rows(op, names[i], i < 2 ? x[i] : out[i - 2], x[0]);
  }
  for (int j = 0; j < 2; ++j)
    jobs.job[j] = {slope[j].data, rstd[j].data,  x[j].data, x[j].stride, out[j].data,
                   out[j].stride, rows, int32_t(x[0].channels)};
  check_channels(op, x[0].channels);
  if (rows == 0) return;
  const DType dtype = dtype_of(op, "q", q);
  const CurrentStream stream(q);
  check_launched(op, kernels_of(dtype, dtype).qk_norm_stats_backward(jobs, stream.get()));
  for (int j = 0; j < 2; ++j) {
    Tensor target = *tensors[2 + j];
    if (out[j].copied) torch::stable::copy_(target, out[j].kept);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm(
    const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, double eps,
    const std::string& rounding) {
  const Tensor x[] = {q, k}, weights[] = {q_weight, k_weight};
  const Rows rows[] = {Rows(q, 2), Rows(k, 2)};
  check_rows("qk_norm", "k", rows[1], rows[0]);
  check_same("qk_norm", "k", k, q);
  check_dtype("qk_norm", "k", k, q.scalar_type());
  const Vector w[] = {{"qk_norm", "q_weight", q_weight, q, rows[0].channels},
                      {"qk_norm", "k_weight", k_weight, q, rows[0].channels}};
  Tensor normed[2], rstd[2];
  Jobs<NormParams> jobs = {{}, 2};
  for (int j = 0; j < 2; ++j) {
    normed[j] = empty_like_of(x[j], x[j].scalar_type());
    rstd[j] = empty_floats(x[j], leading_sizes(x[j], 2));
    NormParams& p = jobs.job[j] = norm_params("qk_norm", rows[j], eps);
    p.weight = w[j].parameter;
    p.normed = normed[j].data_ptr();
    p.rstd = floats(rstd[j]);
    p.round_before_weight = rounding == "reference";
  }
  const DType dtype = dtype_of("qk_norm", "q", q);
  run_norm("qk_norm", q, dtype, dtype, jobs);
  return {normed[0], normed[1], rstd[0], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(
    const Tensor& grad_q_normed, const Tensor& grad_k_normed, const Tensor& q, const Tensor& k, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& rstd_q, const Tensor& rstd_k, std::vector<bool> mask) {
  const char* op = "qk_norm_backward";
  Backward for_q(op, {{}, grad_q_normed, q, {}, {}, {}, q_weight, {}, rstd_q, q.scalar_type(),
                      {mask[0], false, false, mask[2], false}, 2});
  Backward for_k(op, {{}, grad_k_normed, k, {}, {}, {}, k_weight, {}, rstd_k, k.scalar_type(),
                      {mask[1], false, false, mask[3], false}, 2});
  check_rows(op, "k", for_k.shape, for_q.shape);
  for (const Tensor* t : {&grad_q_normed, &grad_k_normed, &k}) check_dtype(op, "grad or k", *t, q.scalar_type());
  run_backward(op, {&for_q, &for_k});
  return {for_q.grad_residual, for_k.grad_residual, for_q.grad(kGradWeight), for_k.grad(kGradWeight)};
}

// ---- GELU -----------------------------------------------------------------------------------------------------------

Tensor run_gelu(const char* op, const Tensor& pre_activation, const Maybe& grad_y) {
  const Tensor z = torch::stable::contiguous(pre_activation);
  const DType dtype = dtype_of(op, "pre_activation", z);
  Tensor grad;
  if (grad_y) {
    check_same(op, "grad_y", *grad_y, z);
    check_numel(op, "grad_y", *grad_y, z.numel());
    check_dtype(op, "grad_y", *grad_y, z.scalar_type());
    grad = torch::stable::contiguous(*grad_y);
  }
  Tensor y = empty_like_of(z, z.scalar_type());
  if (z.numel() == 0) return y;
  const CurrentStream stream(z);
  const GeluParams p = {z.data_ptr(), grad_y ? grad.data_ptr() : nullptr, y.data_ptr(), z.numel()};
  check_launched(op, kernels_of(dtype, dtype).gelu(p, stream.get()));
  return y;
}

Tensor gelu(const Tensor& pre_activation) { return run_gelu("gelu", pre_activation, {}); }
Tensor gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) {
  return run_gelu("gelu_backward", pre_activation, grad_y);
}

}  // namespace
}  // namespace internvit::cuda

INTERNVIT_DEFINE(INTERNVIT_LIBRARY, m) {
  internvit::define_row_ops(m);
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
