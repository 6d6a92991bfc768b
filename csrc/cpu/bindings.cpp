// The raw ops torch.ops.internvit_cpu.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// Here the library, its threads and memory, attention and Linears; ops over rows are in bindings_rows.cpp. No other file
// knows torch. Arguments were validated in internvit/ops; checks here are a backstop.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../schemas.h"
#include "bindings.h"

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

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

namespace {

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
      size = 0;
      const int64_t pages = (bytes + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, size_t(pages));
      STD_TORCH_CHECK(memory, "internvit_cpu: no memory for ", pages, " bytes of working space");
      size = pages;
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

}  // namespace

const Executor kExecutor = {torch_parallel_for, thread_scratch, shared_scratch};

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

namespace {

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
                  "pack_weight: expected a bfloat16 matrix on a machine with AVX-512 BF16 or AMX");
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
  m.impl("attention", TORCH_BOX(&internvit::attention));
  m.impl("pack_weight", TORCH_BOX(&internvit::pack_weight));
  m.impl("linear_packed", TORCH_BOX(&internvit::linear_packed));
  m.impl("attention_backward", TORCH_BOX(&internvit::attention_backward));
}
