// The raw ops over rows: norms, the residual's addition, QK-norm, GELU, and their backward.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/op_checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

// ---- norms ----------------------------------------------------------------------------------------------------------

NormParams norm_params(const Rows& x, DType dtype, double eps) {
  NormParams p = {};
  p.dtype = p.residual_dtype = dtype;
  p.x = x.data;
  p.x_stride = x.stride;
  p.rows = x.rows;
  p.channels = int32_t(x.channels);
  p.eps = float(eps);
  p.rows_per_image = 1;
  return p;
}

std::tuple<Tensor, Tensor> rms_norm_of(const Tensor& x, int channel_dims, const Tensor& weight, double eps,
                                       const std::string& rounding) {
  const Rows rows(x, channel_dims);
  const Floats w{OptionalTensor(weight)};
  Tensor y = empty_like_of(x, x.scalar_type()), rstd = empty_floats(x, leading_sizes(x, channel_dims));
  NormParams p = norm_params(rows, dtype_of(x), eps);
  p.weight = w.data;
  p.normed = y.data_ptr();
  p.rstd = floats(rstd);
  p.round_before_weight = rounding == "reference";
  kernels().norm(p, kExecutor);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& rounding) {
  check::rms_norm(x, weight, eps, rounding);
  return rms_norm_of(x, 1, weight, eps, rounding);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              double eps) {
  check::layer_norm(x, weight, bias, eps);
  const Rows rows(x);
  const Floats w{OptionalTensor(weight)}, b{bias};
  Tensor y = empty_like_of(x, x.scalar_type());
  Tensor mean = empty_floats(x, leading_sizes(x)), rstd = empty_floats(x, leading_sizes(x));
  NormParams p = norm_params(rows, dtype_of(x), eps);
  p.weight = w.data;
  p.bias = b.data;
  p.normed = y.data_ptr();
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.layer_norm = true;
  kernels().norm(p, kExecutor);
  return {y, mean, rstd};
}

struct FusedAdd {  // residual + row_scale * gamma * branch
  Rows residual, branch;
  Floats gamma, row_scale;
  Tensor out;
  NormParams params;
  FusedAdd(const Tensor& r, const Tensor& b, const OptionalTensor& g, const OptionalTensor& s, double eps)
      : residual(r), branch(b), gamma(g), row_scale(s), out(empty_like_of(r, r.scalar_type())) {
    params = norm_params(branch, dtype_of(b), eps);
    params.residual_dtype = dtype_of(r);
    params.residual = residual.data;
    params.residual_stride = residual.stride;
    params.gamma = gamma.data;
    params.row_scale = row_scale.data;
    params.rows_per_image = rows_per_image(r, residual.rows);
    params.residual_out = out.data_ptr();
  }
};

Tensor layer_scale_residual(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                            const OptionalTensor& row_scale) {
  check::layer_scale_residual(residual, branch, gamma, row_scale);
  FusedAdd fused(residual, branch, gamma, row_scale, 0);
  kernels().norm(fused.params, kExecutor);
  return fused.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm(const Tensor& residual, const Tensor& branch,
                                                                     const OptionalTensor& gamma,
                                                                     const OptionalTensor& row_scale,
                                                                     const Tensor& weight, const OptionalTensor& bias,
                                                                     double eps, const std::string& norm_type,
                                                                     const std::string& rounding) {
  check::layer_scale_residual_norm(residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding);
  FusedAdd fused(residual, branch, gamma, row_scale, eps);
  const Floats w{OptionalTensor(weight)}, b{bias};
  const bool layer_norm = norm_type == "layer_norm";
  Tensor normed = empty_like_of(branch, branch.scalar_type());
  Tensor mean = empty_floats(residual, layer_norm ? leading_sizes(residual) : std::vector<int64_t>{0});
  Tensor rstd = empty_floats(residual, leading_sizes(residual));
  NormParams& p = fused.params;
  p.weight = w.data;
  p.bias = b.data;
  p.normed = normed.data_ptr();
  p.mean = layer_norm ? floats(mean) : nullptr;
  p.rstd = floats(rstd);
  p.layer_norm = layer_norm;
  p.round_before_weight = rounding == "reference" && !layer_norm;
  kernels().norm(p, kExecutor);
  return {fused.out, normed, mean, rstd};
}

// ---- their backward -------------------------------------------------------------------------------------------------

// A gradient of a parameter: summed in float32, returned in the parameter's dtype; or the empty stand-in.
struct GradSums {
  Tensor sums;
  ScalarType dtype = ScalarType::Float;
  bool asked;
  GradSums(bool asked, const Tensor& like, const OptionalTensor& parameter) : asked(asked) {
    sums = asked ? empty_floats(like, {parameter->size(0)}) : empty_grad(like);
    if (asked) dtype = parameter->scalar_type();
  }
  float* data() const { return asked ? floats(sums) : nullptr; }
  Tensor get() const { return asked ? converted(sums, dtype) : sums; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const OptionalTensor& grad_residual_out, const OptionalTensor& grad_normed, const OptionalTensor& x,
    const OptionalTensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale,
    const OptionalTensor& weight, const OptionalTensor& bias_like, const OptionalTensor& mean,
    const OptionalTensor& rstd, ScalarType branch_dtype, const std::vector<bool>& mask, int channel_dims = 1) {
  const Tensor& first = x ? *x : *grad_residual_out;
  const auto rows_of = [&](const OptionalTensor& t) { return t ? Rows(*t, channel_dims) : Rows(); };
  const Rows shape(first, channel_dims), dy = rows_of(grad_normed), dr = rows_of(grad_residual_out), in = rows_of(x),
                                         br = rows_of(mask[2] ? branch : OptionalTensor());
  const Floats g{gamma}, s{row_scale}, w{weight}, m{mean}, r{rstd};
  Tensor grad_residual = mask[0] ? empty_like_of(first, first.scalar_type()) : empty_grad(first);
  Tensor grad_branch = mask[1] ? empty_like_of(first, branch_dtype) : empty_grad(first);
  const GradSums grad_gamma(mask[2], first, gamma), grad_weight(mask[3], first, weight),
      grad_bias(mask[4], first, bias_like);
  Tensor partial = empty_floats(first, {norm_backward_chunks(shape.rows), kParameterKinds, shape.channels});

  NormBackwardParams p = {};
  p.residual_dtype = dtype_of(first);
  p.dtype = grad_normed ? dtype_of(*grad_normed) : branch ? dtype_of(*branch) : p.residual_dtype;
  if (mask[1]) p.dtype = dtype_of(grad_branch);
  p.grad_normed = dy.data;
  p.grad_normed_stride = dy.stride;
  p.grad_residual_out = dr.data;
  p.grad_residual_out_stride = dr.stride;
  p.x = in.data;
  p.x_stride = in.stride;
  p.branch = br.data;
  p.branch_stride = br.stride;
  p.gamma = g.data;
  p.row_scale = s.data;
  p.rows_per_image = rows_per_image(first, shape.rows);
  p.weight = w.data;
  p.mean = m.data;
  p.rstd = r.data;
  p.grad_residual = mask[0] ? grad_residual.data_ptr() : nullptr;
  p.grad_branch = mask[1] ? grad_branch.data_ptr() : nullptr;
  p.grads[kGamma] = grad_gamma.data();
  p.grads[kWeight] = grad_weight.data();
  p.grads[kBias] = grad_bias.data();
  p.partial = floats(partial);
  p.rows = shape.rows;
  p.channels = int32_t(shape.channels);
  p.partial_rows = int32_t(norm_backward_chunks(shape.rows));
  kernels().norm_backward(p, kExecutor);
  return {grad_residual, grad_branch, grad_gamma.get(), grad_weight.get(), grad_bias.get()};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, const std::vector<bool>& mask) {
  check::rms_norm_backward(grad_y, x, weight, rstd, mask);
  const auto grads = norm_backward({}, grad_y, x, {}, {}, {}, weight, {}, {}, rstd, x.scalar_type(),
                                   {mask[0], false, false, mask[1], false});
  return {std::get<0>(grads), std::get<3>(grads)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const std::vector<bool>& mask) {
  check::layer_norm_backward(grad_y, x, weight, mean, rstd, mask);
  const auto grads = norm_backward({}, grad_y, x, {}, {}, {}, weight, weight, mean, rstd, x.scalar_type(),
                                   {mask[0], false, false, mask[1], mask[2]});
  return {std::get<0>(grads), std::get<3>(grads), std::get<4>(grads)};
}

std::tuple<Tensor, Tensor> layer_scale_residual_backward(const Tensor& grad_residual_out, const OptionalTensor& branch,
                                                         const OptionalTensor& gamma, const OptionalTensor& row_scale,
                                                         ScalarType branch_dtype, const std::vector<bool>& mask) {
  check::layer_scale_residual_backward(grad_residual_out, branch, gamma, row_scale, branch_dtype, mask);
  const auto grads = norm_backward(grad_residual_out, {}, {}, branch, gamma, row_scale, {}, {}, {}, {}, branch_dtype,
                                   {false, mask[0], mask[1], false, false});
  return {std::get<1>(grads), std::get<2>(grads)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_backward(
    const OptionalTensor& grad_residual_out, const Tensor& grad_normed, const Tensor& residual_out,
    const OptionalTensor& branch, const OptionalTensor& gamma, const OptionalTensor& row_scale, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const std::string& norm_type, const std::vector<bool>& mask) {
  check::layer_scale_residual_norm_backward(grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale,
                                            weight, mean, rstd, norm_type, mask);
  const OptionalTensor used_mean = norm_type == "layer_norm" ? OptionalTensor(mean) : OptionalTensor();
  return norm_backward(grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, weight,
                       used_mean, rstd, grad_normed.scalar_type(), mask);
}

// ---- QK-norm --------------------------------------------------------------------------------------------------------

Tensor token_rstd(const Tensor& x, double eps) {
  const Rows rows(x, 2);
  Tensor rstd = empty_floats(x, leading_sizes(x, 2));
  NormParams p = norm_params(rows, dtype_of(x), eps);
  p.rstd = floats(rstd);
  kernels().norm(p, kExecutor);
  return rstd;
}

std::tuple<Tensor, Tensor> qk_norm_stats(const Tensor& q, const Tensor& k, double eps) {
  check::qk_norm_stats(q, k, eps);
  return {token_rstd(q, eps), token_rstd(k, eps)};
}

void add_stats_grad(const Tensor& grad_rstd, const Tensor& x, const Tensor& rstd, const Tensor& grad_x) {
  const Rows in(x, 2), out(grad_x, 2);
  const Floats slope{OptionalTensor(grad_rstd)}, r{OptionalTensor(rstd)};
  const QKNormStatsBackwardParams p = {
      slope.data, r.data, in.data, in.stride, out.data, out.stride, in.rows, int32_t(in.channels), dtype_of(x)};
  kernels().qk_norm_stats_backward(p, kExecutor);
  if (out.copied) {
    Tensor target = grad_x;
    torch::stable::copy_(target, out.kept);
  }
}

void qk_norm_stats_backward(const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q, const Tensor& k,
                            const Tensor& rstd_q, const Tensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k) {
  check::qk_norm_stats_backward(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k);
  add_stats_grad(grad_rstd_q, q, rstd_q, grad_q);
  add_stats_grad(grad_rstd_k, k, rstd_k, grad_k);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                   const Tensor& k_weight, double eps, const std::string& rounding) {
  check::qk_norm(q, k, q_weight, k_weight, eps, rounding);
  const auto [q_normed, rstd_q] = rms_norm_of(q, 2, q_weight, eps, rounding);
  const auto [k_normed, rstd_k] = rms_norm_of(k, 2, k_weight, eps, rounding);
  return {q_normed, k_normed, rstd_q, rstd_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& grad_q_normed, const Tensor& grad_k_normed,
                                                            const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                            const Tensor& k_weight, const Tensor& rstd_q,
                                                            const Tensor& rstd_k, const std::vector<bool>& mask) {
  check::qk_norm_backward(grad_q_normed, grad_k_normed, q, k, q_weight, k_weight, rstd_q, rstd_k, mask);
  const auto one = [](const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, bool x_asked,
                      bool weight_asked) {
    return norm_backward({}, grad, x, {}, {}, {}, weight, {}, {}, rstd, x.scalar_type(),
                         {x_asked, false, false, weight_asked, false}, 2);
  };
  const auto for_q = one(grad_q_normed, q, q_weight, rstd_q, mask[0], mask[2]);
  const auto for_k = one(grad_k_normed, k, k_weight, rstd_k, mask[1], mask[3]);
  return {std::get<0>(for_q), std::get<0>(for_k), std::get<3>(for_q), std::get<3>(for_k)};
}

// ---- GELU -----------------------------------------------------------------------------------------------------------

Tensor run_gelu(const Tensor& pre_activation, const OptionalTensor& grad_y) {
  const Tensor z = torch::stable::contiguous(pre_activation);
  const Tensor grad = grad_y ? torch::stable::contiguous(*grad_y) : Tensor();
  Tensor y = empty_like_of(z, z.scalar_type());
  const GeluParams p = {z.data_ptr(), grad_y ? grad.data_ptr() : nullptr, y.data_ptr(), z.numel(), dtype_of(z)};
  kernels().gelu(p, kExecutor);
  return y;
}

Tensor gelu(const Tensor& pre_activation) {
  check::gelu(pre_activation);
  return run_gelu(pre_activation, {});
}

Tensor gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) {
  check::gelu_backward(grad_y, pre_activation);
  return run_gelu(pre_activation, grad_y);
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&internvit::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&internvit::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&internvit::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&internvit::layer_norm_backward));
  m.impl("layer_scale_residual", TORCH_BOX(&internvit::layer_scale_residual));
  m.impl("layer_scale_residual_backward", TORCH_BOX(&internvit::layer_scale_residual_backward));
  m.impl("layer_scale_residual_norm", TORCH_BOX(&internvit::layer_scale_residual_norm));
  m.impl("layer_scale_residual_norm_backward", TORCH_BOX(&internvit::layer_scale_residual_norm_backward));
  m.impl("qk_norm_stats", TORCH_BOX(&internvit::qk_norm_stats));
  m.impl("qk_norm_stats_backward", TORCH_BOX(&internvit::qk_norm_stats_backward));
  m.impl("qk_norm", TORCH_BOX(&internvit::qk_norm));
  m.impl("qk_norm_backward", TORCH_BOX(&internvit::qk_norm_backward));
  m.impl("gelu", TORCH_BOX(&internvit::gelu));
  m.impl("gelu_backward", TORCH_BOX(&internvit::gelu_backward));
}
