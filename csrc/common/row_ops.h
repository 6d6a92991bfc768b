// The raw ops over rows, once for both libraries: norms, the residual's addition, QK-norm, GELU, and their backward.
//
// A `Backend` has `Vector` (row_jobs.h) and runs jobs, those of one call at a time:
//   norm(op, {job, ...}),  norm_backward(op, {job, ...}),  qk_norm_stats_backward(op, {job, ...}),
//   gelu(op, like, params),  quantize_rows(op, job)
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/op_checks.h"
#include "common/row_jobs.h"

namespace internvit {

template <class Backend>
struct RowOps {
  using Norm = NormJob<typename Backend::Vector>;
  using NormBackward = NormBackwardJob<typename Backend::Vector>;

  // ---- norms --------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                             const std::string& rounding) {
    check::rms_norm(x, weight, eps, rounding);
    Norm job(x, eps);
    job.normalize(weight, {}, false, rounding == "reference");
    Backend::norm("rms_norm", {&job});
    return {job.normed, job.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight,
                                                       const OptionalTensor& bias, double eps) {
    check::layer_norm(x, weight, bias, eps);
    Norm job(x, eps);
    job.normalize(weight, bias, true, false);
    Backend::norm("layer_norm", {&job});
    return {job.normed, job.mean, job.rstd};
  }

  static Tensor layer_scale_residual(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                                     const OptionalTensor& row_scale) {
    check::layer_scale_residual(residual, branch, gamma, row_scale);
    Norm job(branch, 0);
    job.add_to(residual, gamma, row_scale);
    Backend::norm("layer_scale_residual", {&job});
    return job.residual_out;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm(
      const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale,
      const Tensor& weight, const OptionalTensor& bias, double eps, const std::string& norm_type,
      const std::string& rounding) {
    check::layer_scale_residual_norm(residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding);
    const bool layer_norm = norm_type == "layer_norm";
    Norm job(branch, eps);
    job.add_to(residual, gamma, row_scale);
    job.normalize(weight, bias, layer_norm, rounding == "reference" && !layer_norm);
    Backend::norm("layer_scale_residual_norm", {&job});
    return {job.residual_out, job.normed, layer_norm ? job.mean : empty_grad(residual), job.rstd};
  }

  // ---- rows in int8 and float8 --------------------------------------------------------------------------------------

  using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

  static ThreeTensors per_token_quant(const Tensor& x, bool symmetric, ScalarType dtype) {
    check::per_token_quant(x, symmetric, dtype);
    return quantize_rows("per_token_quant", x, symmetric, dtype, false);
  }

  static ThreeTensors gelu_quant(const Tensor& pre_activation, bool symmetric, ScalarType dtype) {
    check::gelu_quant(pre_activation, symmetric, dtype);
    return quantize_rows("gelu_quant", pre_activation, symmetric, dtype, true);
  }

  static ThreeTensors rms_norm_quant(const Tensor& x, const Tensor& weight, double eps, bool symmetric,
                                     ScalarType dtype) {
    check::rms_norm_quant(x, weight, eps, symmetric, dtype);
    Norm job(x, eps);
    job.normalize_and_quantize(weight, {}, false, symmetric, dtype);
    Backend::norm("rms_norm_quant", {&job});
    return {job.quantized.x_q, job.quantized.x_scale, job.quantized.x_zero};
  }

  static ThreeTensors layer_norm_quant(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                                       bool symmetric, ScalarType dtype) {
    check::layer_norm_quant(x, weight, bias, eps, symmetric, dtype);
    Norm job(x, eps);
    job.normalize_and_quantize(weight, bias, true, symmetric, dtype);
    Backend::norm("layer_norm_quant", {&job});
    return {job.quantized.x_q, job.quantized.x_scale, job.quantized.x_zero};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_quant(
      const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale,
      const Tensor& weight, const OptionalTensor& bias, double eps, const std::string& norm_type, bool symmetric,
      ScalarType dtype) {
    check::layer_scale_residual_norm_quant(residual, branch, gamma, row_scale, weight, bias, eps, norm_type, symmetric,
                                           dtype);
    Norm job(branch, eps);
    job.add_to(residual, gamma, row_scale);
    job.normalize_and_quantize(weight, bias, norm_type == "layer_norm", symmetric, dtype);
    Backend::norm("layer_scale_residual_norm_quant", {&job});
    return {job.residual_out, job.quantized.x_q, job.quantized.x_scale, job.quantized.x_zero};
  }

  // ---- their backward -----------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                      const Tensor& rstd, const std::vector<bool>& mask) {
    check::rms_norm_backward(grad_y, x, weight, rstd, mask);
    NormBackward job(of_rms_norm(grad_y, x, weight, rstd, mask[0], mask[1]));
    Backend::norm_backward("rms_norm_backward", {&job});
    return {job.grad_residual, job.grad(kWeight)};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                                const Tensor& weight, const Tensor& mean,
                                                                const Tensor& rstd, const std::vector<bool>& mask) {
    check::layer_norm_backward(grad_y, x, weight, mean, rstd, mask);
    NormBackwardInputs in = of_rms_norm(grad_y, x, weight, rstd, mask[0], mask[1]);
    in.mean = mean;
    in.mask[4] = mask[2];
    NormBackward job(std::move(in));
    Backend::norm_backward("layer_norm_backward", {&job});
    return {job.grad_residual, job.grad(kWeight), job.grad(kBias)};
  }

  static std::tuple<Tensor, Tensor> layer_scale_residual_backward(
      const Tensor& grad_residual_out, const OptionalTensor& branch, const OptionalTensor& gamma,
      const OptionalTensor& row_scale, ScalarType branch_dtype, const std::vector<bool>& mask) {
    check::layer_scale_residual_backward(grad_residual_out, branch, gamma, row_scale, branch_dtype, mask);
    NormBackwardInputs in;
    in.grad_residual_out = grad_residual_out;
    in.branch = branch;
    in.gamma = gamma;
    in.row_scale = row_scale;
    in.branch_dtype = branch_dtype;
    in.mask = {false, mask[0], mask[1], false, false};
    NormBackward job(std::move(in));
    Backend::norm_backward("layer_scale_residual_backward", {&job});
    return {job.grad_branch, job.grad(kGamma)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_backward(
      const OptionalTensor& grad_residual_out, const Tensor& grad_normed, const Tensor& residual_out,
      const OptionalTensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale, const Tensor& weight,
      const Tensor& mean, const Tensor& rstd, const std::string& norm_type, const std::vector<bool>& mask) {
    check::layer_scale_residual_norm_backward(grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale,
                                              weight, mean, rstd, norm_type, mask);
    const OptionalTensor used_mean = norm_type == "layer_norm" ? OptionalTensor(mean) : OptionalTensor();
    NormBackward job({grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, used_mean, rstd,
                      grad_normed.scalar_type(), mask});
    Backend::norm_backward("layer_scale_residual_norm_backward", {&job});
    return {job.grad_residual, job.grad_branch, job.grad(kGamma), job.grad(kWeight), job.grad(kBias)};
  }

  // ---- QK-norm ------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> qk_norm_stats(const Tensor& q, const Tensor& k, double eps) {
    check::qk_norm_stats(q, k, eps);
    Norm for_q(q, eps, 2), for_k(k, eps, 2);
    for_q.keep_statistics(false);
    for_k.keep_statistics(false);
    Backend::norm("qk_norm_stats", {&for_q, &for_k});
    return {for_q.rstd, for_k.rstd};
  }

  static void qk_norm_stats_backward(const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q,
                                     const Tensor& k, const Tensor& rstd_q, const Tensor& rstd_k, const Tensor& grad_q,
                                     const Tensor& grad_k) {
    check::qk_norm_stats_backward(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k);
    const QKNormStatsBackwardJob for_q(grad_rstd_q, q, rstd_q, grad_q), for_k(grad_rstd_k, k, rstd_k, grad_k);
    Backend::qk_norm_stats_backward("qk_norm_stats_backward", {&for_q, &for_k});
    for_q.copy_back();
    for_k.copy_back();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                            const Tensor& k_weight, double eps,
                                                            const std::string& rounding) {
    check::qk_norm(q, k, q_weight, k_weight, eps, rounding);
    Norm for_q(q, eps, 2), for_k(k, eps, 2);
    for_q.normalize(q_weight, {}, false, rounding == "reference");
    for_k.normalize(k_weight, {}, false, rounding == "reference");
    Backend::norm("qk_norm", {&for_q, &for_k});
    return {for_q.normed, for_k.normed, for_q.rstd, for_k.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& grad_q_normed,
                                                                     const Tensor& grad_k_normed, const Tensor& q,
                                                                     const Tensor& k, const Tensor& q_weight,
                                                                     const Tensor& k_weight, const Tensor& rstd_q,
                                                                     const Tensor& rstd_k,
                                                                     const std::vector<bool>& mask) {
    check::qk_norm_backward(grad_q_normed, grad_k_normed, q, k, q_weight, k_weight, rstd_q, rstd_k, mask);
    NormBackward for_q(of_rms_norm(grad_q_normed, q, q_weight, rstd_q, mask[0], mask[2], 2));
    NormBackward for_k(of_rms_norm(grad_k_normed, k, k_weight, rstd_k, mask[1], mask[3], 2));
    Backend::norm_backward("qk_norm_backward", {&for_q, &for_k});
    return {for_q.grad_residual, for_k.grad_residual, for_q.grad(kWeight), for_k.grad(kWeight)};
  }

  // ---- GELU ---------------------------------------------------------------------------------------------------------

  static Tensor gelu(const Tensor& pre_activation) {
    check::gelu(pre_activation);
    return run_gelu("gelu", pre_activation, {});
  }

  static Tensor gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) {
    check::gelu_backward(grad_y, pre_activation);
    return run_gelu("gelu_backward", pre_activation, grad_y);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("rms_norm", TORCH_BOX(&RowOps::rms_norm));
    m.impl("rms_norm_backward", TORCH_BOX(&RowOps::rms_norm_backward));
    m.impl("layer_norm", TORCH_BOX(&RowOps::layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&RowOps::layer_norm_backward));
    m.impl("layer_scale_residual", TORCH_BOX(&RowOps::layer_scale_residual));
    m.impl("layer_scale_residual_backward", TORCH_BOX(&RowOps::layer_scale_residual_backward));
    m.impl("layer_scale_residual_norm", TORCH_BOX(&RowOps::layer_scale_residual_norm));
    m.impl("layer_scale_residual_norm_backward", TORCH_BOX(&RowOps::layer_scale_residual_norm_backward));
    m.impl("qk_norm_stats", TORCH_BOX(&RowOps::qk_norm_stats));
    m.impl("qk_norm_stats_backward", TORCH_BOX(&RowOps::qk_norm_stats_backward));
    m.impl("qk_norm", TORCH_BOX(&RowOps::qk_norm));
    m.impl("qk_norm_backward", TORCH_BOX(&RowOps::qk_norm_backward));
    m.impl("gelu", TORCH_BOX(&RowOps::gelu));
    m.impl("gelu_backward", TORCH_BOX(&RowOps::gelu_backward));
    m.impl("per_token_quant", TORCH_BOX(&RowOps::per_token_quant));
    m.impl("gelu_quant", TORCH_BOX(&RowOps::gelu_quant));
    m.impl("rms_norm_quant", TORCH_BOX(&RowOps::rms_norm_quant));
    m.impl("layer_norm_quant", TORCH_BOX(&RowOps::layer_norm_quant));
    m.impl("layer_scale_residual_norm_quant", TORCH_BOX(&RowOps::layer_scale_residual_norm_quant));
  }

 private:
  static NormBackwardInputs of_rms_norm(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                        bool x_asked, bool weight_asked, int channel_dims = 1) {
    NormBackwardInputs in;
    in.grad_normed = grad_y;
    in.x = x;
    in.weight = weight;
    in.rstd = rstd;
    in.branch_dtype = x.scalar_type();
    in.mask = {x_asked, false, false, weight_asked, false};
    in.channel_dims = channel_dims;
    return in;
  }

  static ThreeTensors quantize_rows(const char* op, const Tensor& x, bool symmetric, ScalarType dtype, bool gelu) {
    const QuantizeRowsJob job(x, symmetric, dtype, gelu);
    Backend::quantize_rows(op, job);
    return {job.quantized.x_q, job.quantized.x_scale, job.quantized.x_zero};
  }

  static Tensor run_gelu(const char* op, const Tensor& pre_activation, const OptionalTensor& grad_y) {
    const Tensor z = torch::stable::contiguous(pre_activation);
    const Tensor grad = grad_y ? torch::stable::contiguous(*grad_y) : Tensor();
    Tensor y = empty_like_of(z, z.scalar_type());
    Backend::gelu(op, z, {z.data_ptr(), grad_y ? grad.data_ptr() : nullptr, y.data_ptr(), z.numel(), dtype_of(z)});
    return y;
  }
};

}  // namespace internvit
