// The checks of each op that both libraries have, and of attention. They come first in a raw op, before anything is
// read.
#pragma once

#include "common/checks.h"

namespace internvit::check {

inline int64_t channels_of(const Tensor& x) { return x.size(x.dim() - 1); }

inline void norm(const Checks& check, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  check.rows();
  check.parameter("weight", weight, channels_of(x));
  check.bias(bias, weight);
  check.eps(eps);
}

inline void rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& rounding) {
  const Checks check("rms_norm", "x", x);
  norm(check, x, weight, {}, eps);
  check.rounding(rounding);
}

inline void rms_norm_quant(const Tensor& x, const Tensor& weight, double eps, bool symmetric, ScalarType dtype) {
  const Checks check("rms_norm_quant", "x", x);
  norm(check, x, weight, {}, eps);
  check.quantized(symmetric, dtype);
}

inline void rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                              const std::vector<bool>& output_mask) {
  const Checks check("rms_norm_backward", "x", x);
  check.rows();
  check.like_x("grad_y", grad_y);
  check.parameter("weight", weight, channels_of(x));
  check.floating("rstd", rstd, leading_sizes(x));
  check.output_mask(output_mask, 2);
}

inline void layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  norm(Checks("layer_norm", "x", x), x, weight, bias, eps);
}

inline void layer_norm_quant(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                             bool symmetric, ScalarType dtype) {
  const Checks check("layer_norm_quant", "x", x);
  norm(check, x, weight, bias, eps);
  check.quantized(symmetric, dtype);
}

inline void layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                const Tensor& rstd, const std::vector<bool>& output_mask) {
  const Checks check("layer_norm_backward", "x", x);
  check.rows();
  check.like_x("grad_y", grad_y);
  check.parameter("weight", weight, channels_of(x));
  check.floating("mean", mean, leading_sizes(x));
  check.floating("rstd", rstd, leading_sizes(x));
  check.output_mask(output_mask, 3);
}

inline void fused_add(const Checks& check, const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                      const OptionalTensor& row_scale) {
  check.rows();
  check.shape("residual", residual, branch.sizes());
  check.residual_dtype("residual", residual, "branch", branch.scalar_type());
  check.parameter("gamma", gamma, channels_of(branch));
  check.row_scale(row_scale);
}

inline void layer_scale_residual(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                                 const OptionalTensor& row_scale) {
  fused_add(Checks("layer_scale_residual", "branch", branch), residual, branch, gamma, row_scale);
}

// What the gradients of the branch and of gamma are made of; x is the residual's gradient, or the residual.
inline void fused_add_backward(const Checks& check, const Tensor& x, const OptionalTensor& branch,
                               const OptionalTensor& gamma, const OptionalTensor& row_scale, const char* source,
                               ScalarType branch_dtype, bool grad_gamma_asked) {
  check.rows();
  if (branch) {
    check.shape("branch", *branch, x.sizes());
    check.branch_dtype("branch", *branch, source, branch_dtype);
  }
  check.parameter("gamma", gamma, channels_of(x));
  check.row_scale(row_scale);
  if (!grad_gamma_asked) return;
  check.given("branch", branch, "where output_mask asks for grad_gamma");
  check.given("gamma", gamma, "where output_mask asks for grad_gamma");
}

inline void layer_scale_residual_backward(const Tensor& grad_residual_out, const OptionalTensor& branch,
                                          const OptionalTensor& gamma, const OptionalTensor& row_scale,
                                          ScalarType branch_dtype, const std::vector<bool>& output_mask) {
  const char* op = "layer_scale_residual_backward";
  const Checks check(op, "grad_residual_out", grad_residual_out);
  check.output_mask(output_mask, 2);
  STD_TORCH_CHECK(is_storage_type(branch_dtype), op, ": branch_dtype must be float32, bfloat16 or float16, got ",
                  branch_dtype);
  check.residual_dtype("grad_residual_out", grad_residual_out, "branch_dtype", branch_dtype);
  fused_add_backward(check, grad_residual_out, branch, gamma, row_scale, "branch_dtype", branch_dtype, output_mask[1]);
}

inline void fused_add_norm(const char* op, const Checks& check, const Tensor& residual, const Tensor& branch,
                           const OptionalTensor& gamma, const OptionalTensor& row_scale, const Tensor& weight,
                           const OptionalTensor& bias, double eps, const std::string& norm_type) {
  fused_add(check, residual, branch, gamma, row_scale);
  norm(check, branch, weight, bias, eps);
  check.one_of("norm_type", norm_type, "rms_norm", "layer_norm");
  STD_TORCH_CHECK(!bias || norm_type == "layer_norm", op, ": bias must be None for norm_type 'rms_norm', got shape ",
                  list_of(bias->sizes()));
}

inline void layer_scale_residual_norm(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                                      const OptionalTensor& row_scale, const Tensor& weight, const OptionalTensor& bias,
                                      double eps, const std::string& norm_type, const std::string& rounding) {
  const char* op = "layer_scale_residual_norm";
  const Checks check(op, "branch", branch);
  fused_add_norm(op, check, residual, branch, gamma, row_scale, weight, bias, eps, norm_type);
  check.rounding(rounding);
}

inline void layer_scale_residual_norm_quant(const Tensor& residual, const Tensor& branch, const OptionalTensor& gamma,
                                            const OptionalTensor& row_scale, const Tensor& weight,
                                            const OptionalTensor& bias, double eps, const std::string& norm_type,
                                            bool symmetric, ScalarType dtype) {
  const char* op = "layer_scale_residual_norm_quant";
  const Checks check(op, "branch", branch);
  fused_add_norm(op, check, residual, branch, gamma, row_scale, weight, bias, eps, norm_type);
  check.quantized(symmetric, dtype);
}

inline void layer_scale_residual_norm_backward(const OptionalTensor& grad_residual_out, const Tensor& grad_normed,
                                               const Tensor& residual_out, const OptionalTensor& branch,
                                               const OptionalTensor& gamma, const OptionalTensor& row_scale,
                                               const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                               const std::string& norm_type, const std::vector<bool>& output_mask) {
  const char* op = "layer_scale_residual_norm_backward";
  const Checks check(op, "residual_out", residual_out);
  check.output_mask(output_mask, 5);
  check.one_of("norm_type", norm_type, "rms_norm", "layer_norm");
  check.shape("grad_normed", grad_normed, residual_out.sizes());
  STD_TORCH_CHECK(is_storage_type(grad_normed.scalar_type()), op,
                  ": grad_normed must be float32, bfloat16 or float16, got ", grad_normed.scalar_type());
  check.residual_dtype("residual_out", residual_out, "grad_normed", grad_normed.scalar_type());
  if (grad_residual_out) check.like_x("grad_residual_out", *grad_residual_out);
  fused_add_backward(check, residual_out, branch, gamma, row_scale, "grad_normed", grad_normed.scalar_type(),
                     output_mask[2]);
  check.parameter("weight", weight, channels_of(residual_out));
  if (norm_type == "layer_norm") check.floating("mean", mean, leading_sizes(residual_out));
  check.floating("rstd", rstd, leading_sizes(residual_out));
}

inline void per_token_quant(const Tensor& x, bool symmetric, ScalarType dtype) {
  const Checks check("per_token_quant", "x", x);
  check.rows();
  check.quantized(symmetric, dtype);
}

inline void gelu_quant(const Tensor& pre_activation, bool symmetric, ScalarType dtype) {
  const Checks check("gelu_quant", "pre_activation", pre_activation);
  check.rows();
  check.quantized(symmetric, dtype);
}

inline void qk_norm_stats(const Tensor& q, const Tensor& k, double eps) {
  const Checks check("qk_norm_stats", "q", q);
  check.heads();
  check.like_x("k", k);
  check.eps(eps);
}

inline void qk_norm_stats_backward(const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q,
                                   const Tensor& k, const Tensor& rstd_q, const Tensor& rstd_k, const Tensor& grad_q,
                                   const Tensor& grad_k) {
  const Checks check("qk_norm_stats_backward", "q", q);
  check.heads();
  check.like_x("k", k);
  const auto by_token = leading_sizes(q, 2);
  check.floating("grad_rstd_q", grad_rstd_q, by_token);
  check.floating("grad_rstd_k", grad_rstd_k, by_token);
  check.floating("rstd_q", rstd_q, by_token);
  check.floating("rstd_k", rstd_k, by_token);
  check.output_like_x("grad_q", grad_q);
  check.output_like_x("grad_k", grad_k);
}

inline void qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, double eps,
                    const std::string& rounding) {
  const Checks check("qk_norm", "q", q);
  check.heads();
  check.like_x("k", k);
  check.parameter("q_weight", q_weight, q.size(2) * q.size(3));
  check.parameter("k_weight", k_weight, q.size(2) * q.size(3));
  check.eps(eps);
  check.rounding(rounding);
}

inline void qk_norm_backward(const Tensor& grad_q_normed, const Tensor& grad_k_normed, const Tensor& q, const Tensor& k,
                             const Tensor& q_weight, const Tensor& k_weight, const Tensor& rstd_q, const Tensor& rstd_k,
                             const std::vector<bool>& output_mask) {
  const Checks check("qk_norm_backward", "q", q);
  check.heads();
  check.like_x("k", k);
  check.like_x("grad_q_normed", grad_q_normed);
  check.like_x("grad_k_normed", grad_k_normed);
  check.parameter("q_weight", q_weight, q.size(2) * q.size(3));
  check.parameter("k_weight", k_weight, q.size(2) * q.size(3));
  check.floating("rstd_q", rstd_q, leading_sizes(q, 2));
  check.floating("rstd_k", rstd_k, leading_sizes(q, 2));
  check.output_mask(output_mask, 4);
}

inline void gelu(const Tensor& pre_activation) { Checks("gelu", "pre_activation", pre_activation); }

inline void gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) {
  Checks("gelu_backward", "pre_activation", pre_activation).like_x("grad_y", grad_y);
}

// QK-norm's weights and statistics, all four or none.
struct QKNorm {
  const OptionalTensor &q_weight, &k_weight, &rstd_q, &rstd_k;
  bool given() const { return q_weight || k_weight || rstd_q || rstd_k; }
};

// Of packed sequences; keys' own where they are not the queries'.
struct Ends {
  const OptionalTensor &queries, &keys;
};

inline void attention_inputs(const Checks& check, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                             const QKNorm& norm, const Ends& ends) {
  check.heads(bool(ends.queries));
  check.scale(scale);
  check.key_sequences(ends.queries, ends.keys, norm.given());
  check.keys(k, v, !norm.given() && (!ends.queries || ends.keys));
  if (norm.given()) {
    const char* why = "with the others of q_weight, k_weight, rstd_q and rstd_k: all four or none";
    check.given("q_weight", norm.q_weight, why);
    check.given("k_weight", norm.k_weight, why);
    check.given("rstd_q", norm.rstd_q, why);
    check.given("rstd_k", norm.rstd_k, why);
  }
  const int64_t channels = q.size(q.dim() - 2) * q.size(q.dim() - 1);
  check.parameter("q_weight", norm.q_weight, channels);
  check.parameter("k_weight", norm.k_weight, channels);
  check.floating("rstd_q", norm.rstd_q, leading_sizes(q, 2));
  check.floating("rstd_k", norm.rstd_k, leading_sizes(q, 2));
  check.cu_seqlens("cu_seqlens", ends.queries, q.size(0));
  check.cu_seqlens("cu_seqlens_k", ends.keys, k.size(0));
}

// lse's and the row dots': [B, H, N], or [H, total].
inline std::vector<int64_t> by_head(const Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

inline void attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const QKNorm& norm,
                      const Ends& ends) {
  attention_inputs(Checks("attention", "q", q), q, k, v, scale, norm, ends);
}

inline void attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out, const Tensor& lse, double scale, const QKNorm& norm,
                               const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Ends& ends) {
  const Checks check("attention_backward", "q", q);
  attention_inputs(check, q, k, v, scale, norm, ends);
  check.like_x("grad_out", grad_out);
  check.like_x("out", out);
  check.floating("lse", lse, by_head(q));
  check.output_like_x("grad_q", grad_q);
  check.output("grad_k", grad_k, k);
  check.output("grad_v", grad_v, k);
}

inline void attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, const QKNorm& norm,
                                  const OptionalTensor& cu_seqlens) {
  const Checks check("attention_column_sums", "q", q);
  check.like_x("k", k);
  attention_inputs(check, q, k, k, scale, norm, {cu_seqlens, {}});
  check.floating("lse", lse, by_head(q));
}

}  // namespace internvit::check
