// The backward of the norms and of the fused residual, as a job of norm_backward.cuh: what it reads, writes and
// returns.
#pragma once

#include <utility>
#include <vector>

#include "cuda/device/launch.h"
#include "cuda/torch/arguments.h"
#include "cuda/torch/stream.h"

namespace internvit::cuda {

struct BackwardInputs {
  OptionalTensor grad_residual_out, grad_normed, x, branch, gamma, row_scale, weight, mean, rstd;
  ScalarType branch_dtype;
  std::vector<bool> mask;  // of grad_residual, grad_branch, grad_gamma, grad_weight, grad_bias
  int channel_dims = 1;
};

// One job of norm_backward, with what it reads and writes.
struct Backward {
  const BackwardInputs in;
  const Tensor like;  // of the residual's dtype
  const DType dtype, residual_dtype;
  const Rows shape, grad_normed, grad_residual_out, x, branch;
  const Vector gamma, weight;
  const Floats row_scale, mean, rstd;
  Tensor grad_residual, grad_branch, grads[kParameterKinds], partial;
  NormBackwardParams params = {};

  Backward(const char* op, BackwardInputs inputs)
      : in(std::move(inputs)),
        like(in.x ? *in.x : *in.grad_residual_out),
        dtype(dtype_of(in.branch_dtype)),
        residual_dtype(dtype_of(like.scalar_type())),
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
    check_channels(op, shape.channels);
    grad_residual = in.mask[0] ? empty_like_of(like, like.scalar_type()) : empty_grad(like);
    grad_branch = in.mask[1] ? empty_like_of(like, in.branch_dtype) : empty_grad(like);
    const OptionalTensor parameters[] = {in.gamma, in.weight, in.weight};  // bias has the weight's dtype
    for (int kind = 0; kind < kParameterKinds; ++kind) {
      grads[kind] = empty_grad(like);
      if (!in.mask[size_t(kind) + 2]) continue;
      const bool is_float32 = parameters[kind]->scalar_type() != in.branch_dtype;
      grads[kind] = torch::stable::new_empty(like, {shape.channels}, is_float32 ? ScalarType::Float : in.branch_dtype);
      params.grads[kind] = {grads[kind].data_ptr(), is_float32};
    }
    NormBackwardParams& p = params;
    p.dtype = dtype;
    p.residual_dtype = residual_dtype;
    p.grad_normed = grad_normed.data;
    p.grad_normed_stride = grad_normed.stride;
    p.grad_residual_out = grad_residual_out.data;
    p.grad_residual_out_stride = grad_residual_out.stride;
    p.x = x.data;
    p.x_stride = x.stride;
    p.branch = branch.data;
    p.branch_stride = branch.stride;
    p.gamma = gamma.parameter;
    p.row_scale = row_scale.data;
    p.rows_per_image = rows_per_image(like, shape.rows);
    p.weight = weight.parameter;
    p.mean = mean.data;
    p.rstd = rstd.data;
    p.grad_residual = in.mask[0] ? grad_residual.data_ptr() : nullptr;
    p.grad_branch = in.mask[1] ? grad_branch.data_ptr() : nullptr;
    p.rows = shape.rows;
    p.channels = int32_t(shape.channels);
  }

  // The gradient of a parameter in the parameter's dtype.
  Tensor grad(ParameterKind kind) const {
    const OptionalTensor& parameter = kind == kGamma ? in.gamma : in.weight;
    return in.mask[size_t(kind) + 2] ? converted(grads[kind], parameter->scalar_type()) : grads[kind];
  }

 private:
  Rows rows(const OptionalTensor& t) const { return t ? Rows(*t, in.channel_dims) : Rows(); }
};

inline void run_backward(const char* op, std::vector<Backward*> backwards) {
  const Backward& first = *backwards[0];
  const CurrentStream stream(first.like);
  const RowLaunch rule = row_launch(first.shape.channels, width_of(first.residual_dtype));
  const int64_t resident =
      stream.multiprocessors() * int64_t(resident_blocks(first.residual_dtype, first.shape.channels));
  Jobs<NormBackwardParams> jobs = {};
  for (Backward* backward : backwards) {
    NormBackwardParams& p = backward->params;
    p.partial_rows = int32_t(backward_programs(p.rows, rule, resident));
    backward->partial = empty_floats(backward->like, {p.partial_rows, kParameterKinds, p.channels});
    p.partial = floats(backward->partial);
    jobs.job[jobs.count++] = p;
  }
  check_launched(op, kernels_of(first.dtype, first.residual_dtype).norm_backward(jobs, stream.get()));
}

}  // namespace internvit::cuda
