// The backward of the norms and of the fused residual, as a job of norm_backward.cuh: what it reads, writes and returns.
#pragma once

#include <utility>
#include <vector>

#include "arguments.h"
#include "launch.h"
#include "stream.h"

namespace internvit::cuda {

struct BackwardInputs {
  Maybe grad_residual_out, grad_normed, x, branch, gamma, row_scale, weight, mean, rstd;
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
  const Statistics row_scale, mean, rstd;
  Tensor grad_residual, grad_branch, grads[kGradKinds], partial;
  NormBackwardParams params = {};

  Backward(const char* op, BackwardInputs inputs)
      : in(std::move(inputs)), like(in.x ? *in.x : *in.grad_residual_out),
        dtype(in.grad_normed ? dtype_of(op, "grad_normed", *in.grad_normed) : dtype_of_scalar(op, in.branch_dtype)),
        residual_dtype(dtype_of(op, in.x ? "x" : "grad_residual_out", like)), shape(like, in.channel_dims),
        grad_normed(rows(op, "grad_normed", in.grad_normed)),
        grad_residual_out(rows(op, "grad_residual_out", in.grad_residual_out)), x(rows(op, "x", in.x)),
        branch(rows(op, "branch", in.mask[2] ? in.branch : Maybe())), gamma(vector(op, "gamma", in.gamma)),
        weight(vector(op, "weight", in.weight)),
        row_scale(op, "row_scale", in.row_scale, like, like.dim() ? like.size(0) : 1),
        mean(op, "mean", in.mean, like, shape.rows), rstd(op, "rstd", in.rstd, like, shape.rows) {
    check_channels(op, shape.channels);
    STD_TORCH_CHECK(residual_dtype == kFloat32 || residual_dtype == dtype, op,
                    ": the residual's gradient must be float32 or of the branch's dtype");
    if (in.grad_residual_out) check_dtype(op, "grad_residual_out", *in.grad_residual_out, like.scalar_type());
    if (in.mask[2]) {
      STD_TORCH_CHECK(in.branch && in.gamma, op, ": branch and gamma must be given where grad_gamma is wanted");
      check_dtype(op, "branch", *in.branch, in.branch_dtype);
    }
    grad_residual = in.mask[0] ? empty_like_of(like, like.scalar_type()) : no_grad_asked(like);
    grad_branch = in.mask[1] ? empty_like_of(like, in.branch_dtype) : no_grad_asked(like);
    const Maybe parameters[] = {in.gamma, in.weight, in.weight};  // bias has the weight's dtype
    for (int kind = 0; kind < kGradKinds; ++kind) {
      grads[kind] = no_grad_asked(like);
      if (!in.mask[size_t(kind) + 2]) continue;
      const bool is_float32 = parameters[kind]->scalar_type() != in.branch_dtype;
      grads[kind] = torch::stable::new_empty(like, {shape.channels}, is_float32 ? ScalarType::Float : in.branch_dtype);
      params.grads[kind] = {grads[kind].data_ptr(), is_float32};
    }
    NormBackwardParams& p = params;
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
  Tensor grad(GradKind kind) const {
    const Maybe& parameter = kind == kGradGamma ? in.gamma : in.weight;
    return in.mask[size_t(kind) + 2] ? converted(grads[kind], parameter->scalar_type()) : grads[kind];
  }

 private:
  static DType dtype_of_scalar(const char* op, ScalarType dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                    ": branch_dtype must be float32, bfloat16 or float16, got ", dtype);
    return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
  }
  Rows rows(const char* op, const char* name, const Maybe& t) const {
    if (!t) return {};
    check_same(op, name, *t, like);
    Rows rows(*t, in.channel_dims);
    check_rows(op, name, rows, shape);
    return rows;
  }
  Vector vector(const char* op, const char* name, const Maybe& t) const {
    if (!t) return {};
    check_same(op, name, *t, like);
    check_numel(op, name, *t, shape.channels);
    Vector v;
    v.kept = torch::stable::contiguous(t->scalar_type() == in.branch_dtype ? *t : converted(*t, ScalarType::Float));
    v.parameter = {v.kept.data_ptr(), v.kept.scalar_type() == ScalarType::Float};
    return v;
  }
};

inline void run_backward(const char* op, std::vector<Backward*> backwards) {
  const Backward& first = *backwards[0];
  const CurrentStream stream(first.like);
  const RowLaunch rule = row_launch(first.shape.channels, width_of(first.dtype));
  Jobs<NormBackwardParams> jobs = {};
  for (Backward* backward : backwards) {
    NormBackwardParams& p = backward->params;
    p.programs = int32_t(backward_programs(p.rows, rule, stream.multiprocessors()));
    backward->partial = empty_floats(backward->like, {p.programs, kGradKinds, p.channels});
    p.partial = floats(backward->partial);
    jobs.job[jobs.count++] = p;
  }
  check_launched(op, kernels_of(first.dtype, first.residual_dtype).norm_backward(jobs, stream.get()));
}

}  // namespace internvit::cuda
