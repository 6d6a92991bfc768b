// What one kernel over rows reads and writes: its parameters (params.h), filled, and the tensors behind them.
//
// `Vector` is a backend's view of a model's vector [C]: `Vector(tensor or none, the activations' dtype)` keeps it,
// `parameter` is what kernels get, `grad_dtype` and `grad` say the same of its gradient.
#pragma once

#include <utility>
#include <vector>

#include "common/params.h"
#include "common/tensors.h"

namespace internvit {

// The tensors of quantised rows like x.
struct Quantized {
  Tensor x_q, x_scale, x_zero;

  QuantizedRows allocate(const Tensor& x, bool symmetric, ScalarType dtype) {
    x_q = empty_like_of(x, dtype);
    x_scale = empty_floats(x, leading_sizes(x));
    x_zero = empty_like_of(x_scale, ScalarType::Int);
    return {x_q.data_ptr(), floats(x_scale), static_cast<int32_t*>(x_zero.data_ptr()), dtype_of(dtype), symmetric};
  }
};

// A norm, or the statistics or the residual's addition alone.
template <class Vector>
struct NormJob {
  const Tensor x;
  const int channel_dims;
  const Rows x_rows;
  Rows residual_rows;
  Vector gamma, weight, bias;
  Floats row_scale;
  Tensor residual_out, normed, mean, rstd;
  Quantized quantized;
  NormParamsOf<decltype(Vector::parameter)> params = {};

  NormJob(const Tensor& x, double eps, int channel_dims = 1)
      : x(x), channel_dims(channel_dims), x_rows(x, channel_dims) {
    params.dtype = params.residual_dtype = dtype_of(x);
    params.x = x_rows.data;
    params.x_stride = x_rows.stride;
    params.rows = x_rows.rows;
    params.channels = int32_t(x_rows.channels);
    params.eps = float(eps);
    params.rows_per_image = 1;
  }

  // x is the branch: what is normalised is residual + row_scale * gamma * x.
  void add_to(const Tensor& residual, const OptionalTensor& gamma_or_none, const OptionalTensor& row_scale_or_none) {
    residual_rows = Rows(residual);
    gamma = Vector(gamma_or_none, x.scalar_type());
    row_scale = Floats(row_scale_or_none);
    residual_out = empty_like_of(residual, residual.scalar_type());
    params.residual_dtype = dtype_of(residual);
    params.residual = residual_rows.data;
    params.residual_stride = residual_rows.stride;
    params.gamma = gamma.parameter;
    params.row_scale = row_scale.data;
    params.rows_per_image = rows_per_image(residual, residual_rows.rows);
    params.residual_out = residual_out.data_ptr();
  }

  void keep_statistics(bool layer_norm) {
    rstd = empty_floats(x, leading_sizes(x, channel_dims));
    params.rstd = floats(rstd);
    if (!layer_norm) return;
    mean = empty_floats(x, leading_sizes(x, channel_dims));
    params.mean = floats(mean);
  }

  void normalize(const Tensor& weight_given, const OptionalTensor& bias_or_none, bool layer_norm,
                 bool round_before_weight) {
    scale_and_shift(weight_given, bias_or_none, layer_norm);
    normed = empty_like_of(x, x.scalar_type());
    keep_statistics(layer_norm);
    params.normed = normed.data_ptr();
    params.round_before_weight = round_before_weight;
  }

  void normalize_and_quantize(const Tensor& weight_given, const OptionalTensor& bias_or_none, bool layer_norm,
                              bool symmetric, ScalarType dtype) {
    scale_and_shift(weight_given, bias_or_none, layer_norm);
    params.quantized = quantized.allocate(x, symmetric, dtype);
  }

 private:
  void scale_and_shift(const Tensor& weight_given, const OptionalTensor& bias_or_none, bool layer_norm) {
    weight = Vector(weight_given, x.scalar_type());
    bias = Vector(bias_or_none, x.scalar_type());
    params.weight = weight.parameter;
    params.bias = bias.parameter;
    params.layer_norm = layer_norm;
  }
};

struct QuantizeRowsJob {
  const Tensor x;
  const Rows x_rows;
  Quantized quantized;
  QuantizeRowsParams params;

  QuantizeRowsJob(const Tensor& x, bool symmetric, ScalarType dtype, bool gelu)
      : x(x),
        x_rows(x),
        params{
            x_rows.data, x_rows.stride, quantized.allocate(x, symmetric, dtype), x_rows.rows, int32_t(x_rows.channels),
            dtype_of(x), gelu} {}
};

struct NormBackwardInputs {
  OptionalTensor grad_residual_out, grad_normed, x, branch, gamma, row_scale, weight, mean, rstd;
  ScalarType branch_dtype;
  std::vector<bool> mask;  // of grad_residual, grad_branch, grad_gamma, grad_weight, grad_bias
  int channel_dims = 1;
};

// The backward of NormJob. A gradient that is not asked for is the empty stand-in.
template <class Vector>
struct NormBackwardJob {
  const NormBackwardInputs in;
  const Tensor like;  // of the residual's dtype
  const Rows shape, grad_normed, grad_residual_out, x, branch;
  const Vector gamma, weight;
  const Floats row_scale, mean, rstd;
  Tensor grad_residual, grad_branch, grads[kParameterKinds], partial;
  NormBackwardParamsOf<decltype(Vector::parameter), decltype(Vector::grad(std::declval<Tensor>()))> params = {};

  explicit NormBackwardJob(NormBackwardInputs inputs)
      : in(std::move(inputs)),
        like(in.x ? *in.x : *in.grad_residual_out),
        shape(like, in.channel_dims),
        grad_normed(rows(in.grad_normed)),
        grad_residual_out(rows(in.grad_residual_out)),
        x(rows(in.x)),
        branch(rows(in.mask[2] ? in.branch : OptionalTensor())),
        gamma(in.gamma, in.branch_dtype),
        weight(in.weight, in.branch_dtype),
        row_scale(in.row_scale),
        mean(in.mean),
        rstd(in.rstd) {
    grad_residual = in.mask[0] ? empty_like_of(like, like.scalar_type()) : empty_grad(like);
    grad_branch = in.mask[1] ? empty_like_of(like, in.branch_dtype) : empty_grad(like);
    for (const ParameterKind kind : {kGamma, kWeight, kBias}) {
      grads[kind] = empty_grad(like);
      if (!asked(kind)) continue;
      const ScalarType dtype = Vector::grad_dtype(parameter(kind).scalar_type(), in.branch_dtype);
      grads[kind] = torch::stable::new_empty(like, {shape.channels}, dtype);
      params.grads[kind] = Vector::grad(grads[kind]);
    }
    params.dtype = dtype_of(in.branch_dtype);
    params.residual_dtype = dtype_of(like);
    params.grad_normed = grad_normed.data;
    params.grad_normed_stride = grad_normed.stride;
    params.grad_residual_out = grad_residual_out.data;
    params.grad_residual_out_stride = grad_residual_out.stride;
    params.x = x.data;
    params.x_stride = x.stride;
    params.branch = branch.data;
    params.branch_stride = branch.stride;
    params.gamma = gamma.parameter;
    params.row_scale = row_scale.data;
    params.rows_per_image = rows_per_image(like, shape.rows);
    params.weight = weight.parameter;
    params.mean = mean.data;
    params.rstd = rstd.data;
    params.grad_residual = in.mask[0] ? grad_residual.data_ptr() : nullptr;
    params.grad_branch = in.mask[1] ? grad_branch.data_ptr() : nullptr;
    params.rows = shape.rows;
    params.channels = int32_t(shape.channels);
  }

  // The number of partial rows is the backend's.
  void sum_through(int64_t partial_rows) {
    partial = empty_floats(like, {partial_rows, kParameterKinds, shape.channels});
    params.partial = floats(partial);
    params.partial_rows = int32_t(partial_rows);
  }

  // The gradient of a parameter in the parameter's dtype.
  Tensor grad(ParameterKind kind) const {
    return asked(kind) ? converted(grads[kind], parameter(kind).scalar_type()) : grads[kind];
  }

 private:
  Rows rows(const OptionalTensor& t) const { return t ? Rows(*t, in.channel_dims) : Rows(); }
  bool asked(ParameterKind kind) const { return in.mask[size_t(kind) + 2]; }
  const Tensor& parameter(ParameterKind kind) const { return kind == kGamma ? *in.gamma : *in.weight; }  // bias's too
};

// The gradient that flows through QK-norm's statistics, added to grad_x.
struct QKNormStatsBackwardJob {
  const Tensor x, grad_x;
  const Rows x_rows, grad_rows;
  const Floats grad_rstd, rstd;
  const QKNormStatsBackwardParams params;

  QKNormStatsBackwardJob(const Tensor& grad_rstd_given, const Tensor& x, const Tensor& rstd_given, const Tensor& grad_x)
      : x(x),
        grad_x(grad_x),
        x_rows(x, 2),
        grad_rows(grad_x, 2),
        grad_rstd(OptionalTensor(grad_rstd_given)),
        rstd(OptionalTensor(rstd_given)),
        params{grad_rstd.data, rstd.data,        x_rows.data, x_rows.stride,
               grad_rows.data, grad_rows.stride, x_rows.rows, int32_t(x_rows.channels),
               dtype_of(x)} {}

  // What the kernel wrote where grad_x's rows have more than one stride.
  void copy_back() const {
    if (!grad_rows.copied) return;
    Tensor target = grad_x;
    torch::stable::copy_(target, grad_rows.kept);
  }
};

}  // namespace internvit
