// The raw ops attention and attention_backward.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/op_checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

// q, k, v as they are when a head's channels are contiguous; else a copy.
Tensor dense_heads(const Tensor& t) {
  return t.numel() == 0 || t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

HeadsView view_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                     const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                     const OptionalTensor& rstd_q, const OptionalTensor& rstd_k) {
  check::attention(q, k, v, scale, {q_weight, k_weight, rstd_q, rstd_k});
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k), dense_v = dense_heads(v);
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  Tensor out = empty_like_of(q, q.scalar_type()), lse = empty_floats(q, {batch, heads, tokens});
  if (out.numel() == 0) return {out, lse};
  const AttentionParams p = {dtype_of(q), view_of(dense_q), view_of(dense_k), view_of(dense_v), wq.data, wk.data,
                             rq.data,     rk.data,          out.data_ptr(),   floats(lse),      batch,   tokens,
                             heads,       head_dim,         float(scale)};
  kernels().attention(p, kExecutor);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    double scale, const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& rstd_q,
    const OptionalTensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  check::attention_backward(grad_out, q, k, v, out, lse, scale, {q_weight, k_weight, rstd_q, rstd_k}, grad_q, grad_k,
                            grad_v);
  const Tensor inputs[] = {dense_heads(q),   dense_heads(k),      dense_heads(v),      dense_heads(grad_out),
                           dense_heads(out), dense_heads(grad_q), dense_heads(grad_k), dense_heads(grad_v)};
  const Floats dense_lse{OptionalTensor(lse)};
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const std::vector<int64_t> nothing = {0}, by_token = {batch, heads, tokens}, by_channel = {batch, heads * head_dim};
  const bool normed = bool(q_weight);
  Tensor partial_q = empty_floats(q, normed ? by_channel : nothing),
         partial_k = empty_floats(q, normed ? by_channel : nothing);
  Tensor row_dot_q = empty_floats(q, normed ? by_token : nothing),
         row_dot_k = empty_floats(q, normed ? by_token : nothing);
  if (q.numel() > 0) {
    const AttentionBackwardParams p = {dtype_of(q),
                                       view_of(inputs[0]),
                                       view_of(inputs[1]),
                                       view_of(inputs[2]),
                                       view_of(inputs[3]),
                                       view_of(inputs[4]),
                                       dense_lse.data,
                                       wq.data,
                                       wk.data,
                                       rq.data,
                                       rk.data,
                                       view_of(inputs[5]),
                                       view_of(inputs[6]),
                                       view_of(inputs[7]),
                                       floats(partial_q),
                                       floats(partial_k),
                                       floats(row_dot_q),
                                       floats(row_dot_k),
                                       batch,
                                       tokens,
                                       heads,
                                       head_dim,
                                       float(scale)};
    kernels().attention_backward(p, kExecutor);
    const Tensor* targets[] = {&grad_q, &grad_k, &grad_v};
    for (int i = 0; i < 3; ++i) {
      Tensor target = *targets[i];
      if (inputs[5 + i].data_ptr() != target.data_ptr()) torch::stable::copy_(target, inputs[5 + i]);
    }
  }
  if (!normed) return {partial_q, partial_k, row_dot_q, row_dot_k};
  const std::vector<int64_t> over_images = {0};
  const auto total = [&](const Tensor& partial, const Tensor& weight) {
    return converted(torch::stable::sum(partial, over_images), weight.scalar_type());
  };
  return {total(partial_q, *q_weight), total(partial_k, *k_weight), row_dot_q, row_dot_k};
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&internvit::attention));
  m.impl("attention_backward", TORCH_BOX(&internvit::attention_backward));
}
