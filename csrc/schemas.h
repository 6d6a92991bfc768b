// The ops that both compiled libraries have, stated once: the same arguments on a CPU and on a GPU.
#pragma once

namespace internvit {

template <class Library>
void define_row_ops(Library& m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, str rounding) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, bool[2] output_mask) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("layer_scale_residual(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale) -> Tensor");
  m.def(
      "layer_scale_residual_backward(Tensor grad_out, Tensor? branch, Tensor? gamma, Tensor? row_scale,"
      " ScalarType branch_dtype, bool[2] output_mask) -> (Tensor, Tensor)");
  m.def(
      "layer_scale_residual_norm(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, Tensor weight,"
      " Tensor? bias, float eps, str kind, str rounding) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_scale_residual_norm_backward(Tensor? grad_residual_out, Tensor grad_normed, Tensor residual_out,"
      " Tensor? branch, Tensor? gamma, Tensor? row_scale, Tensor weight, Tensor mean, Tensor rstd, str kind,"
      " bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("qk_norm_stats(Tensor q, Tensor k, float eps) -> (Tensor, Tensor)");
  m.def(
      "qk_norm_stats_backward(Tensor grad_rstd_q, Tensor grad_rstd_k, Tensor q, Tensor k, Tensor rstd_q, Tensor rstd_k,"
      " Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()");
  m.def(
      "qk_norm(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, str rounding)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_backward(Tensor grad_q_normed, Tensor grad_k_normed, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
      " Tensor rstd_q, Tensor rstd_k, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gelu(Tensor pre_activation) -> Tensor");
  m.def("gelu_backward(Tensor grad_y, Tensor pre_activation) -> Tensor");
}

}  // namespace internvit
