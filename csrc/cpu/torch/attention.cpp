// The raw ops attention, attention_backward and attention_column_sums.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/op_checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

// q, k, v as they are when a head's channels are contiguous; else a copy.
Tensor dense_heads(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.numel() == 0 || t.stride(last) == 1 || t.size(last) == 1 ? t : torch::stable::contiguous(t);
}

// Of [B, N, H, D], or of [total, H, D] as one image.
HeadsView view_of(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), 0, t.stride(0), t.stride(1)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The sizes of a batch, or of packed sequences.
struct Images {
  Tensor kept, kept_k;
  const int32_t *cu_seqlens = nullptr, *cu_seqlens_k = nullptr;
  int64_t batch, tokens, keys, heads, head_dim, row_stride, sequences = 0;

  Images(const Tensor& q, const Tensor& k, const OptionalTensor& ends, const OptionalTensor& ends_k)
      : heads(q.size(q.dim() - 2)), head_dim(q.size(q.dim() - 1)) {
    batch = ends ? 1 : q.size(0);
    tokens = row_stride = ends ? q.size(0) : q.size(1);
    keys = ends ? k.size(0) : k.size(1);
    if (!ends) return;
    kept = torch::stable::contiguous(*ends);
    cu_seqlens = static_cast<const int32_t*>(kept.data_ptr());
    sequences = kept.numel() - 1;
    keys = tokens = longest(cu_seqlens);
    if (!ends_k) return;
    kept_k = torch::stable::contiguous(*ends_k);
    cu_seqlens_k = static_cast<const int32_t*>(kept_k.data_ptr());
    keys = longest(cu_seqlens_k);
  }

 private:
  int64_t longest(const int32_t* ends) const {
    int64_t most = 0;
    for (int64_t i = 0; i < sequences; ++i) most = std::max(most, int64_t(ends[i + 1]) - ends[i]);
    return most;
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                     const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                     const OptionalTensor& rstd_q, const OptionalTensor& rstd_k,
                                     const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k) {
  check::attention(q, k, v, scale, {q_weight, k_weight, rstd_q, rstd_k}, {cu_seqlens, cu_seqlens_k});
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k), dense_v = dense_heads(v);
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  Tensor out = empty_like_of(q, q.scalar_type()), lse = empty_floats(q, check::by_head(q));
  if (out.numel() == 0) return {out, lse};
  const Images n(q, k, cu_seqlens, cu_seqlens_k);
  const AttentionParams p = {dtype_of(q),  view_of(dense_q), view_of(dense_k), view_of(dense_v), wq.data,
                             wk.data,      rq.data,          rk.data,          out.data_ptr(),   floats(lse),
                             n.batch,      n.tokens,         n.keys,           n.heads,          n.head_dim,
                             n.row_stride, float(scale),     n.cu_seqlens,     n.cu_seqlens_k,   n.sequences};
  kernels().attention(p, kExecutor);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    double scale, const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& rstd_q,
    const OptionalTensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
    const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k) {
  check::attention_backward(grad_out, q, k, v, out, lse, scale, {q_weight, k_weight, rstd_q, rstd_k}, grad_q, grad_k,
                            grad_v, {cu_seqlens, cu_seqlens_k});
  const Tensor inputs[] = {dense_heads(q),   dense_heads(k),      dense_heads(v),      dense_heads(grad_out),
                           dense_heads(out), dense_heads(grad_q), dense_heads(grad_k), dense_heads(grad_v)};
  const Floats dense_lse{OptionalTensor(lse)};
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  const Images n(q, k, cu_seqlens, cu_seqlens_k);
  const std::vector<int64_t> nothing = {0}, by_token = check::by_head(q);
  const std::vector<int64_t> by_channel = {cu_seqlens ? n.sequences : n.batch, n.heads * n.head_dim};
  const bool normed = bool(q_weight);
  Tensor partial_q = empty_floats(q, normed ? by_channel : nothing),
         partial_k = empty_floats(q, normed ? by_channel : nothing);
  Tensor row_dot_q = empty_floats(q, normed ? by_token : nothing),
         row_dot_k = empty_floats(q, normed ? by_token : nothing);
  if (cu_seqlens || q.numel() == 0)  // no kernel writes those of images without tokens
    for (Tensor* partial : {&partial_q, &partial_k}) std::fill_n(floats(*partial), partial->numel(), 0.0f);
  if (q.numel() > 0 || k.numel() > 0) {
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
                                       n.batch,
                                       n.tokens,
                                       n.keys,
                                       n.heads,
                                       n.head_dim,
                                       n.row_stride,
                                       float(scale),
                                       n.cu_seqlens,
                                       n.cu_seqlens_k,
                                       n.sequences};
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

Tensor attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, double scale,
                             const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                             const OptionalTensor& rstd_q, const OptionalTensor& rstd_k,
                             const OptionalTensor& cu_seqlens) {
  check::attention_column_sums(q, k, lse, scale, {q_weight, k_weight, rstd_q, rstd_k}, cu_seqlens);
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k);
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k}, dense_lse{OptionalTensor(lse)};
  Tensor sums = empty_floats(q, check::by_head(q));
  if (sums.numel() == 0) return sums;
  const Images n(q, k, cu_seqlens, {});
  const AttentionColumnSumsParams p = {dtype_of(q),  view_of(dense_q), view_of(dense_k), wq.data,      wk.data,
                                       rq.data,      rk.data,          dense_lse.data,   floats(sums), n.batch,
                                       n.tokens,     n.keys,           n.heads,          n.head_dim,   n.row_stride,
                                       float(scale), n.cu_seqlens,     nullptr,          n.sequences};
  kernels().attention_column_sums(p, kExecutor);
  return sums;
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&internvit::attention));
  m.impl("attention_backward", TORCH_BOX(&internvit::attention_backward));
  m.impl("attention_column_sums", TORCH_BOX(&internvit::attention_column_sums));
}
