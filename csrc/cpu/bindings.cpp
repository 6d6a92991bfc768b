// The raw ops torch.ops.internvit_cpu.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// The only file that knows torch. Arguments were validated in internvit/ops; checks here are a backstop.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../schemas.h"
#include "../tensors.h"
#include "kernels.h"

namespace internvit {
namespace {

// The instruction set in use: the best one, unless a test or a benchmark chose another.
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = [] {
    const Kernels* const* list = supported_kernels();
    while (list[1]) ++list;
    return list[0];
  }();
  return kernels;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::string instruction_sets() {
  std::string names;
  for (const Kernels* const* k = supported_kernels(); *k; ++k) names += (names.empty() ? "" : " ") + std::string((*k)->name);
  return names;
}

std::string use_instruction_set(const std::string& name) {
  const std::string previous = kernels().name;
  for (const Kernels* const* k = supported_kernels(); *k; ++k) {
    if (name == (*k)->name) {
      current().store(*k, std::memory_order_relaxed);
      return previous;
    }
  }
  STD_TORCH_CHECK(false, "use_instruction_set: this machine has ", instruction_sets(), ", got ", name);
  return previous;
}

// Each thread keeps its working memory: allocating it anew costs a page fault for every 4 KiB of every call.
struct Workspace {
  void* memory = nullptr;
  int64_t size = 0;
  ~Workspace() { std::free(memory); }

  void* at_least(int64_t bytes) {
    if (size < bytes) {
      std::free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, size_t(size));
      STD_TORCH_CHECK(memory, "internvit_cpu: no memory for ", size, " bytes of working space");
    }
    return memory;
  }
};

void* thread_scratch(int64_t bytes) {
  thread_local Workspace workspace;
  return workspace.at_least(bytes);
}

void* shared_scratch(int64_t bytes) {
  thread_local Workspace workspace;
  return workspace.at_least(bytes);
}

void torch_parallel_for(int64_t n, int64_t grain, void (*task)(void*, int64_t, int64_t), void* state) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { task(state, begin, end); });
}

constexpr Executor kExecutor = {torch_parallel_for, thread_scratch, shared_scratch};

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "internvit_cpu: expected float32, bfloat16 or float16, got ", t.scalar_type());
      return kFloat32;
  }
}

// ---- norms ----------------------------------------------------------------------------------------------------------

NormParams norm_params(const Rows& x, DType dtype, double eps) {
  NormParams p = {};
  p.dtype = p.residual_dtype = dtype;
  p.x = x.data;
  p.x_stride = x.stride;
  p.rows = x.rows;
  p.channels = x.channels;
  p.eps = float(eps);
  p.rows_per_image = 1;
  return p;
}

std::tuple<Tensor, Tensor> rms_norm_of(
    const Tensor& x, int channel_dims, const Tensor& weight, double eps, const std::string& rounding) {
  const Rows rows(x, channel_dims);
  const Floats w{Maybe(weight)};
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
  return rms_norm_of(x, 1, weight, eps, rounding);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Maybe& bias, double eps) {
  const Rows rows(x);
  const Floats w{Maybe(weight)}, b{bias};
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

struct Seam {  // residual + row_scale * gamma * branch
  Rows residual, branch;
  Floats gamma, row_scale;
  Tensor out;
  NormParams params;
  Seam(const Tensor& r, const Tensor& b, const Maybe& g, const Maybe& s, double eps)
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

Tensor layer_scale_residual(
    const Tensor& residual, const Tensor& branch, const Maybe& gamma, const Maybe& row_scale) {
  Seam seam(residual, branch, gamma, row_scale, 0);
  kernels().norm(seam.params, kExecutor);
  return seam.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm(
    const Tensor& residual, const Tensor& branch, const Maybe& gamma, const Maybe& row_scale, const Tensor& weight,
    const Maybe& bias, double eps, const std::string& kind, const std::string& rounding) {
  Seam seam(residual, branch, gamma, row_scale, eps);
  const Floats w{Maybe(weight)}, b{bias};
  const bool layer_norm = kind == "layer_norm";
  Tensor normed = empty_like_of(branch, branch.scalar_type());
  Tensor mean = empty_floats(residual, layer_norm ? leading_sizes(residual) : std::vector<int64_t>{0});
  Tensor rstd = empty_floats(residual, leading_sizes(residual));
  NormParams& p = seam.params;
  p.weight = w.data;
  p.bias = b.data;
  p.normed = normed.data_ptr();
  p.mean = layer_norm ? floats(mean) : nullptr;
  p.rstd = floats(rstd);
  p.layer_norm = layer_norm;
  p.round_before_weight = rounding == "reference" && !layer_norm;
  kernels().norm(p, kExecutor);
  return {seam.out, normed, mean, rstd};
}

// ---- their backward -------------------------------------------------------------------------------------------------

// A gradient of a parameter: summed in float32, returned in the parameter's dtype; or the empty stand-in.
struct ParameterGrad {
  Tensor sums;
  ScalarType dtype = ScalarType::Float;
  bool asked;
  ParameterGrad(bool asked, const Tensor& like, const Maybe& parameter) : asked(asked) {
    sums = asked ? empty_floats(like, {parameter->size(0)}) : no_grad_asked(like);
    if (asked) dtype = parameter->scalar_type();
  }
  float* data() const { return asked ? floats(sums) : nullptr; }
  Tensor get() const { return asked ? converted(sums, dtype) : sums; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> seam_backward(
    const Maybe& grad_residual_out, const Maybe& grad_normed, const Maybe& x, const Maybe& branch, const Maybe& gamma,
    const Maybe& row_scale, const Maybe& weight, const Maybe& bias_like, const Maybe& mean, const Maybe& rstd,
    ScalarType branch_dtype, const std::vector<bool>& mask, int channel_dims = 1) {
  const Tensor& first = x ? *x : *grad_residual_out;
  const auto rows_of = [&](const Maybe& t) { return t ? Rows(*t, channel_dims) : Rows(); };
  const Rows shape(first, channel_dims), dy = rows_of(grad_normed), dr = rows_of(grad_residual_out), in = rows_of(x),
             br = rows_of(mask[2] ? branch : Maybe());
  const Floats g{gamma}, s{row_scale}, w{weight}, m{mean}, r{rstd};
  Tensor grad_residual = mask[0] ? empty_like_of(first, first.scalar_type()) : no_grad_asked(first);
  Tensor grad_branch = mask[1] ? empty_like_of(first, branch_dtype) : no_grad_asked(first);
  const ParameterGrad grad_gamma(mask[2], first, gamma), grad_weight(mask[3], first, weight),
      grad_bias(mask[4], first, bias_like);
  Tensor partial = empty_floats(first, {norm_backward_chunks(shape.rows), 3, shape.channels});

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
  p.grad_gamma = grad_gamma.data();
  p.grad_weight = grad_weight.data();
  p.grad_bias = grad_bias.data();
  p.partial = floats(partial);
  p.rows = shape.rows;
  p.channels = shape.channels;
  kernels().norm_backward(p, kExecutor);
  return {grad_residual, grad_branch, grad_gamma.get(), grad_weight.get(), grad_bias.get()};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd, std::vector<bool> mask) {
  const auto grads = seam_backward(
      {}, grad_y, x, {}, {}, {}, weight, {}, {}, rstd, x.scalar_type(), {mask[0], false, false, mask[1], false});
  return {std::get<0>(grads), std::get<3>(grads)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    std::vector<bool> mask) {
  const auto grads = seam_backward(
      {}, grad_y, x, {}, {}, {}, weight, weight, mean, rstd, x.scalar_type(), {mask[0], false, false, mask[1], mask[2]});
  return {std::get<0>(grads), std::get<3>(grads), std::get<4>(grads)};
}

std::tuple<Tensor, Tensor> layer_scale_residual_backward(
    const Tensor& grad_out, const Maybe& branch, const Maybe& gamma, const Maybe& row_scale, ScalarType branch_dtype,
    std::vector<bool> mask) {
  const auto grads = seam_backward(
      grad_out, {}, {}, branch, gamma, row_scale, {}, {}, {}, {}, branch_dtype, {false, mask[0], mask[1], false, false});
  return {std::get<1>(grads), std::get<2>(grads)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_scale_residual_norm_backward(
    const Maybe& grad_residual_out, const Tensor& grad_normed, const Tensor& residual_out, const Maybe& branch,
    const Maybe& gamma, const Maybe& row_scale, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    const std::string& kind, std::vector<bool> mask) {
  const Maybe used_mean = kind == "layer_norm" ? Maybe(mean) : Maybe();
  return seam_backward(grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, weight, used_mean,
                       rstd, grad_normed.scalar_type(), mask);
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
  return {token_rstd(q, eps), token_rstd(k, eps)};
}

void add_stats_grad(const Tensor& grad_rstd, const Tensor& x, const Tensor& rstd, const Tensor& grad_x) {
  const Rows in(x, 2), out(grad_x, 2);
  const Floats slope{Maybe(grad_rstd)}, r{Maybe(rstd)};
  const QKNormStatsBackwardParams p = {
      dtype_of(x), slope.data, r.data, in.data, in.stride, out.data, out.stride, in.rows, in.channels};
  kernels().qk_norm_stats_backward(p, kExecutor);
  if (out.copied) {
    Tensor target = grad_x;
    torch::stable::copy_(target, out.kept);
  }
}

void qk_norm_stats_backward(
    const Tensor& grad_rstd_q, const Tensor& grad_rstd_k, const Tensor& q, const Tensor& k, const Tensor& rstd_q,
    const Tensor& rstd_k, const Tensor& grad_q, const Tensor& grad_k) {
  add_stats_grad(grad_rstd_q, q, rstd_q, grad_q);
  add_stats_grad(grad_rstd_k, k, rstd_k, grad_k);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm(
    const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, double eps,
    const std::string& rounding) {
  const auto [q_normed, rstd_q] = rms_norm_of(q, 2, q_weight, eps, rounding);
  const auto [k_normed, rstd_k] = rms_norm_of(k, 2, k_weight, eps, rounding);
  return {q_normed, k_normed, rstd_q, rstd_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(
    const Tensor& grad_q_normed, const Tensor& grad_k_normed, const Tensor& q, const Tensor& k, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& rstd_q, const Tensor& rstd_k, std::vector<bool> mask) {
  const auto one = [](const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, bool x_asked,
                      bool weight_asked) {
    return seam_backward({}, grad, x, {}, {}, {}, weight, {}, {}, rstd, x.scalar_type(),
                         {x_asked, false, false, weight_asked, false}, 2);
  };
  const auto for_q = one(grad_q_normed, q, q_weight, rstd_q, mask[0], mask[2]);
  const auto for_k = one(grad_k_normed, k, k_weight, rstd_k, mask[1], mask[3]);
  return {std::get<0>(for_q), std::get<0>(for_k), std::get<3>(for_q), std::get<3>(for_k)};
}

// ---- GELU -----------------------------------------------------------------------------------------------------------

Tensor run_gelu(const Tensor& pre_activation, const Maybe& grad_y) {
  const Tensor z = torch::stable::contiguous(pre_activation);
  const Tensor grad = grad_y ? torch::stable::contiguous(*grad_y) : Tensor();
  Tensor y = empty_like_of(z, z.scalar_type());
  const GeluParams p = {dtype_of(z), z.data_ptr(), grad_y ? grad.data_ptr() : nullptr, y.data_ptr(), z.numel()};
  kernels().gelu(p, kExecutor);
  return y;
}

Tensor gelu(const Tensor& pre_activation) { return run_gelu(pre_activation, {}); }
Tensor gelu_backward(const Tensor& grad_y, const Tensor& pre_activation) { return run_gelu(pre_activation, grad_y); }

// ---- attention ------------------------------------------------------------------------------------------------------

// q, k, v as they are when a head's channels are contiguous; else a copy.
Tensor dense_heads(const Tensor& t) {
  return t.numel() == 0 || t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

HeadsView view_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Maybe& q_weight, const Maybe& k_weight,
    const Maybe& rstd_q, const Maybe& rstd_k) {
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k), dense_v = dense_heads(v);
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  Tensor out = empty_like_of(q, q.scalar_type()), lse = empty_floats(q, {batch, heads, tokens});
  if (out.numel() == 0) return {out, lse};
  const AttentionParams p = {dtype_of(q), view_of(dense_q), view_of(dense_k), view_of(dense_v), wq.data, wk.data,
                             rq.data, rk.data, out.data_ptr(), floats(lse), batch, tokens, heads, head_dim,
                             float(scale)};
  kernels().attention(p, kExecutor);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    double scale, const Maybe& q_weight, const Maybe& k_weight, const Maybe& rstd_q, const Maybe& rstd_k,
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  const Tensor inputs[] = {dense_heads(q),   dense_heads(k),      dense_heads(v),     dense_heads(grad_out),
                           dense_heads(out), dense_heads(grad_q), dense_heads(grad_k), dense_heads(grad_v)};
  const Tensor dense_lse = torch::stable::contiguous(lse);
  const Floats wq{q_weight}, wk{k_weight}, rq{rstd_q}, rk{rstd_k};
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const std::vector<int64_t> nothing = {0}, by_token = {batch, heads, tokens}, by_channel = {batch, heads * head_dim};
  const bool normed = bool(q_weight);
  Tensor partial_q = empty_floats(q, normed ? by_channel : nothing), partial_k = empty_floats(q, normed ? by_channel : nothing);
  Tensor row_dot_q = empty_floats(q, normed ? by_token : nothing), row_dot_k = empty_floats(q, normed ? by_token : nothing);
  if (q.numel() > 0) {
    const AttentionBackwardParams p = {dtype_of(q), view_of(inputs[0]), view_of(inputs[1]), view_of(inputs[2]),
                                       view_of(inputs[3]), view_of(inputs[4]), floats(dense_lse), wq.data, wk.data,
                                       rq.data, rk.data, view_of(inputs[5]), view_of(inputs[6]), view_of(inputs[7]),
                                       floats(partial_q), floats(partial_k), floats(row_dot_q), floats(row_dot_k),
                                       batch, tokens, heads, head_dim, float(scale)};
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

// ---- linear -----------------------------------------------------------------------------------------------------------

// Multiplies from registers and L1 on so many threads; returns the flops done, for the caller's clock.
int64_t peak(ScalarType dtype, int64_t rounds, int64_t threads) {
  std::vector<int64_t> flops(size_t(threads), 0);
  const DType of = dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat32;
  kernels().peak({of, rounds, threads, flops.data()}, kExecutor);
  return std::accumulate(flops.begin(), flops.end(), int64_t{0});
}

// Whether this instruction set has a GEMM of its own for that dtype.
bool packs_linear(ScalarType dtype) { return kernels().linear && dtype == ScalarType::BFloat16; }

Tensor pack_weight(const Tensor& weight) {
  STD_TORCH_CHECK(packs_linear(weight.scalar_type()) && weight.dim() == 2,
                  "pack_weight: expected a bfloat16 matrix on a machine with AMX");
  const Tensor w = torch::stable::contiguous(weight);
  const int64_t rows = w.size(0), columns = w.size(1);
  Tensor packed = torch::stable::new_empty(w, {packed_weight_size(rows, columns)});
  kernels().pack_weight({static_cast<const bf16*>(w.data_ptr()), static_cast<bf16*>(packed.data_ptr()), columns, rows},
                        kExecutor);
  return packed;
}

Tensor linear_packed(const Tensor& x, const Tensor& packed_weight, int64_t out_features, const Maybe& bias,
                     const Maybe& residual, bool gelu) {
  const Rows in(x), res(residual);
  const Floats b{bias};
  STD_TORCH_CHECK(packs_linear(x.scalar_type()), "linear_packed: expected bfloat16 on a machine with AVX-512 BF16 or AMX");
  STD_TORCH_CHECK(packed_weight.numel() == packed_weight_size(out_features, in.channels) &&
                      (!residual || (res.rows == in.rows && res.channels == out_features)),
                  "linear_packed: packed_weight or residual does not fit x and out_features");
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(out_features);
  Tensor y = torch::stable::new_empty(x, sizes);
  LinearParams p = {};
  p.x = static_cast<const bf16*>(in.data);
  p.x_stride = in.stride;
  p.packed_weight = static_cast<const bf16*>(packed_weight.data_ptr());
  p.bias = b.data;
  p.residual = static_cast<const bf16*>(res.data);
  p.residual_stride = res.stride;
  p.y = static_cast<bf16*>(y.data_ptr());
  p.rows = in.rows;
  p.in_features = in.channels;
  p.out_features = out_features;
  p.gelu = gelu;
  if (p.rows > 0) kernels().linear(p, kExecutor);
  return y;
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY(internvit_cpu, m) {
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> str");
  internvit::define_row_ops(m);
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q,"
      " Tensor? rstd_k) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
      " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k, Tensor(a!) grad_q, Tensor(b!) grad_k,"
      " Tensor(c!) grad_v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("packs_linear(ScalarType dtype) -> bool");
  m.def("peak(ScalarType dtype, int rounds, int threads) -> int");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor packed_weight, int out_features, Tensor? bias, Tensor? residual, bool gelu)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CompositeExplicitAutograd, m) {
  m.impl("packs_linear", TORCH_BOX(&internvit::packs_linear));
  m.impl("peak", TORCH_BOX(&internvit::peak));
  m.impl("instruction_sets", TORCH_BOX(&internvit::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&internvit::use_instruction_set));
}

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
  m.impl("attention", TORCH_BOX(&internvit::attention));
  m.impl("pack_weight", TORCH_BOX(&internvit::pack_weight));
  m.impl("linear_packed", TORCH_BOX(&internvit::linear_packed));
  m.impl("attention_backward", TORCH_BOX(&internvit::attention_backward));
}
