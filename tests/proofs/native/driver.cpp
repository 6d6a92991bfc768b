// Runs every CPU kernel without torch: in threads under the sanitizers, between guard pages, and in shuffled order.
//
//   driver UNIT MODE [PLANT]     UNIT: generic, avx2, avx512, avx512_vnni, avx512_bf16, amx
//   MODE serial    one range a call
//        threads   ranges on std::threads, as torch's pool would run them (ThreadSanitizer, AddressSanitizer)
//        shuffled  single indices, serially, in random order: any dependence between ranges changes bits
//        counted   the shapes of instructions.json, serially, in one dtype: PLANT is float32 or bfloat16
//   PLANT bounds   tells a kernel of one row more than there is: the guard page must stop it
//         race     gives two threads the same range: ThreadSanitizer must see it
//
// Buffers end at a page without access; reading or writing past them is a crash. Prints one line with a hash per
// kernel.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "guarded.h"

using namespace internvit;

namespace {

std::mt19937 random_bits(1), random_order(2);
bool plant_race = false;

void* guarded_scratch(int64_t bytes) { return guarded((bytes + 63) / 64 * 64); }  // never reused: races stay visible

using Task = void (*)(void*, int64_t, int64_t);

void run_serially(int64_t n, int64_t, Task task, void* state) { task(state, 0, n); }

void run_shuffled(int64_t n, int64_t, Task task, void* state) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(i)] = i;
  std::shuffle(order.begin(), order.end(), random_order);
  for (int64_t i : order) task(state, i, i + 1);
}

void run_threads(int64_t n, int64_t, Task task, void* state) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t) {
    const int64_t begin = plant_race ? 0 : n * t / 4, end = plant_race ? n : n * (t + 1) / 4;
    if (begin < end) threads.emplace_back([=] { task(state, begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

uint64_t hash(const void* data, int64_t bytes, uint64_t seed = 14695981039346656037u) {
  for (int64_t i = 0; i < bytes; ++i) seed = (seed ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return seed;
}

int64_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Small normal-ish numbers in any storage type.
void* filled(DType dtype, int64_t n) {
  char* data = guarded(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const float x = (float(random_bits() % 2001) - 1000) / 500;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t half =
        dtype == kBFloat16 ? uint16_t(bits >> 16) : uint16_t((bits >> 16 & 0x8000) | 0x3800 | (i & 0x1ff));
    if (dtype == kFloat32) memcpy(data + 4 * i, &x, 4);
    if (dtype != kFloat32) memcpy(data + 2 * i, &half, 2);
  }
  return data;
}
float* floats(int64_t n) { return static_cast<float*>(filled(kFloat32, n)); }
float* empty_floats(int64_t n) { return reinterpret_cast<float*>(guarded(n * 4)); }

struct Driver {
  const Kernels& kernels;
  Executor executor;
  bool plant_bounds;
  uint64_t digest = 14695981039346656037u;

  void add(const void* data, int64_t bytes) { digest = hash(data, bytes, digest); }
  void report(const char* kernel, DType dtype) {
    printf("%s %d %016llx\n", kernel, int(dtype), static_cast<unsigned long long>(digest));
    fflush(stdout);
    digest = 14695981039346656037u;
  }

  void norms(DType dtype, int64_t rows, int64_t channels) {
    const int64_t bytes = rows * channels * size_of(dtype);
    NormParams p = {};
    p.dtype = p.residual_dtype = dtype;
    p.x = filled(dtype, rows * channels);
    p.residual = filled(dtype, rows * channels);
    p.x_stride = p.residual_stride = channels;
    p.channels = int32_t(channels);
    p.gamma = floats(channels);
    p.row_scale = floats(1);
    p.rows_per_image = p.rows = rows;
    p.weight = floats(channels);
    p.bias = floats(channels);
    p.residual_out = guarded(bytes);
    p.normed = guarded(bytes);
    p.mean = empty_floats(rows);
    p.rstd = empty_floats(rows);
    p.eps = 1e-6f;
    p.layer_norm = true;
    if (plant_bounds) p.rows += 1;
    kernels.norm(p, executor);
    add(p.residual_out, bytes);
    add(p.normed, bytes);
    report("norm", dtype);

    NormBackwardParams b = {};
    b.dtype = b.residual_dtype = dtype;
    b.grad_normed = filled(dtype, rows * channels);
    b.grad_residual_out = filled(dtype, rows * channels);
    b.x = p.residual_out;
    b.branch = p.x;
    b.grad_normed_stride = b.grad_residual_out_stride = b.x_stride = b.branch_stride = channels;
    b.channels = int32_t(channels);
    b.gamma = p.gamma;
    b.row_scale = p.row_scale;
    b.rows_per_image = b.rows = rows;
    b.weight = p.weight;
    b.mean = p.mean;
    b.rstd = p.rstd;
    b.grad_residual = guarded(bytes);
    b.grad_branch = guarded(bytes);
    for (float*& sum : b.grads) sum = empty_floats(channels);
    b.partial_rows = int32_t(norm_backward_chunks(rows));
    b.partial = empty_floats(b.partial_rows * kParameterKinds * channels);
    kernels.norm_backward(b, executor);
    add(b.grad_residual, bytes);
    add(b.grad_branch, bytes);
    for (float* sum : b.grads) add(sum, channels * 4);
    report("norm_backward", dtype);

    const QKNormStatsBackwardParams s = {
        floats(rows), p.rstd, p.x, channels, filled(dtype, rows * channels), channels, rows, int32_t(channels), dtype};
    kernels.qk_norm_stats_backward(s, executor);
    add(s.grad_x, bytes);
    report("qk_norm_stats_backward", dtype);
  }

  void gelu(DType dtype, int64_t size) {
    for (const void* grad : {static_cast<const void*>(nullptr), static_cast<const void*>(filled(dtype, size))}) {
      const GeluParams p = {filled(dtype, size), grad, guarded(size * size_of(dtype)), size, dtype};
      kernels.gelu(p, executor);
      add(p.y, size * size_of(dtype));
    }
    report("gelu", dtype);
  }

  QuantizedRows quantized_rows(int64_t rows, int64_t channels, DType dtype, bool symmetric) {
    return {guarded(rows * channels), empty_floats(rows), reinterpret_cast<int32_t*>(guarded(rows * 4)), dtype,
            symmetric};
  }

  void add(const QuantizedRows& q, int64_t rows, int64_t channels) {
    add(q.x_q, rows * channels);
    add(q.x_scale, rows * 4);
    add(q.x_zero, rows * 4);
  }

  QuantizedRows quantize(const Kernels& unit, DType dtype, int64_t rows, int64_t channels, DType to, bool symmetric) {
    QuantizeRowsParams p = {};
    p.x = filled(dtype, rows * channels);
    p.x_stride = channels;
    p.quantized = quantized_rows(rows, channels, to, symmetric);
    p.rows = rows;
    p.channels = int32_t(channels);
    p.dtype = dtype;
    unit.quantize_rows(p, executor);
    add(p.quantized, rows, channels);
    report("quantize_rows", dtype);
    return p.quantized;
  }
  QuantizedRows quantize(DType dtype, int64_t rows, int64_t channels, DType to, bool symmetric) {
    return quantize(kernels, dtype, rows, channels, to, symmetric);
  }

  void quantized_norm(DType dtype, int64_t rows, int64_t channels, DType to, bool symmetric) {
    NormParams p = {};
    p.dtype = p.residual_dtype = dtype;
    p.x = filled(dtype, rows * channels);
    p.x_stride = channels;
    p.rows = rows;
    p.channels = int32_t(channels);
    p.weight = floats(channels);
    p.eps = 1e-6f;
    p.quantized = quantized_rows(rows, channels, to, symmetric);
    kernels.norm(p, executor);
    add(p.quantized, rows, channels);
    report("norm", dtype);
  }

  // With `ends` the tokens of a batch of one are packed sequences.
  void attention(DType dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, bool normed,
                 const std::vector<int32_t>& ends = {}) {
    const int64_t width = heads * head_dim, n = batch * tokens * width, bytes = n * size_of(dtype);
    const auto view = [&](const void* data) { return HeadsView{data, tokens * width, width, head_dim}; };
    const auto set_sizes = [&](auto& params) {
      params.batch = batch;
      params.tokens = params.keys = params.row_stride = tokens;
      if (!ends.empty()) {
        params.cu_seqlens = ends.data();
        params.sequences = int64_t(ends.size()) - 1;
        params.tokens = 0;
        for (size_t i = 1; i < ends.size(); ++i)
          params.tokens = std::max<int64_t>(params.tokens, ends[i] - ends[i - 1]);
        params.keys = params.tokens;
      }
      params.heads = heads;
      params.head_dim = head_dim;
      params.scale = 0.125f;
    };
    AttentionParams p = {};
    p.dtype = dtype;
    p.q = view(filled(dtype, n));
    p.k = view(filled(dtype, n));
    p.v = view(filled(dtype, n));
    if (normed) {
      p.q_weight = floats(width);
      p.k_weight = floats(width);
      p.rstd_q = floats(batch * tokens);
      p.rstd_k = floats(batch * tokens);
    }
    p.out = guarded(bytes);
    p.lse = empty_floats(batch * heads * tokens);
    set_sizes(p);
    kernels.attention(p, executor);
    add(p.out, bytes);
    add(p.lse, batch * heads * tokens * 4);
    report("attention", dtype);

    AttentionColumnSumsParams c = {};
    c.dtype = dtype;
    c.q = p.q;
    c.k = p.k;
    c.q_weight = p.q_weight;
    c.k_weight = p.k_weight;
    c.rstd_q = p.rstd_q;
    c.rstd_k = p.rstd_k;
    c.lse = p.lse;
    c.sums = empty_floats(batch * heads * tokens);
    set_sizes(c);
    kernels.attention_column_sums(c, executor);
    add(c.sums, batch * heads * tokens * 4);
    report("attention_column_sums", dtype);

    AttentionBackwardParams b = {};
    b.dtype = dtype;
    b.q = p.q;
    b.k = p.k;
    b.v = p.v;
    b.grad_out = view(filled(dtype, n));
    b.out = view(p.out);
    b.lse = p.lse;
    b.q_weight = p.q_weight;
    b.k_weight = p.k_weight;
    b.rstd_q = p.rstd_q;
    b.rstd_k = p.rstd_k;
    for (HeadsView* grad : {&b.grad_q, &b.grad_k, &b.grad_v}) *grad = view(guarded(bytes));
    const int64_t images = ends.empty() ? batch : int64_t(ends.size()) - 1;
    b.grad_q_weight_partial = empty_floats(images * width);
    b.grad_k_weight_partial = empty_floats(images * width);
    b.row_dot_q = empty_floats(batch * heads * tokens);
    b.row_dot_k = empty_floats(batch * heads * tokens);
    set_sizes(b);
    kernels.attention_backward(b, executor);
    for (const HeadsView& grad : {b.grad_q, b.grad_k, b.grad_v}) add(grad.data, bytes);
    if (normed && ends.empty()) add(b.grad_q_weight_partial, batch * width * 4);
    report("attention_backward", dtype);
  }

  template <class T>
  void linear(int64_t rows, int64_t in, int64_t out) {
    constexpr bool wide = sizeof(T) == 4;
    const DType dtype = wide ? kFloat32 : kBFloat16;
    PackWeightParamsOf<T> w = {};
    w.weight = static_cast<const T*>(filled(dtype, out * in));
    w.packed = reinterpret_cast<T*>(guarded(packed_weight_size(out, in) * int64_t(sizeof(T))));
    w.in_features = in;
    w.out_features = out;
    LinearParamsOf<T> p = {};
    p.x = static_cast<const T*>(filled(dtype, rows * in));
    p.x_stride = p.in_features = in;
    p.packed_weight = w.packed;
    p.bias = floats(out);
    p.residual = static_cast<const T*>(filled(dtype, rows * out));
    p.residual_stride = p.out_features = out;
    p.y = reinterpret_cast<T*>(guarded(rows * out * int64_t(sizeof(T))));
    p.rows = rows;
    for (bool gelu : {false, true}) {
      p.gelu = gelu;
      if constexpr (wide) {
        kernels.pack_weight_float32(w, executor);
        kernels.linear_float32(p, executor);
      } else {
        kernels.pack_weight(w, executor);
        kernels.linear(p, executor);
      }
      add(p.y, rows * out * int64_t(sizeof(T)));
    }
    report("linear", dtype);
  }

  void linear_int8(DType dtype, int64_t rows, int64_t in, int64_t out, bool grouped) {
    // By the generic unit, so that the counts of the one at work are not of its operands.
    const QuantizedRows x = quantize(kGenericKernels, dtype, rows, in, kInt8, false);
    const QuantizedRows weight = quantize(kGenericKernels, kFloat32, out, in, kInt8, true);
    PackWeightInt8Params w = {};
    w.weight_q = static_cast<const int8_t*>(weight.x_q);
    w.group_ratio = grouped ? floats(out * ((in + kInt8GroupSize - 1) / kInt8GroupSize)) : nullptr;
    w.packed = reinterpret_cast<int8_t*>(guarded(packed_weight_int8_size(out, in, grouped)));
    w.in_features = in;
    w.out_features = out;
    kernels.pack_weight_int8(w, executor);
    LinearInt8Params p = {};
    p.x_q = static_cast<const int8_t*>(x.x_q);
    p.x_stride = p.in_features = in;
    p.x_scale = x.x_scale;
    p.x_zero = x.x_zero;
    p.packed_weight = w.packed;
    p.weight_scale = weight.x_scale;
    p.bias = floats(out);
    p.rows = rows;
    p.out_features = out;
    p.grouped = grouped;
    for (DType of : {kFloat32, kBFloat16}) {
      p.dtype = of;
      p.gelu = of == kBFloat16;
      p.y = guarded(rows * out * size_of(of));
      kernels.linear_int8(p, executor);
      add(p.y, rows * out * size_of(of));
    }
    p.x = filled(dtype, rows * in);
    p.x_dtype = dtype;
    p.x_q = nullptr;
    p.x_scale = nullptr;
    p.x_zero = nullptr;
    p.gelu = false;
    p.residual = filled(p.dtype, rows * out);
    p.residual_stride = out;
    p.y = guarded(rows * out * size_of(p.dtype));
    kernels.linear_int8(p, executor);
    add(p.y, rows * out * size_of(p.dtype));
    report("linear_int8", dtype);
    p.residual = nullptr;
    p.gelu = true;
    mlp_int8(p, out, in);
  }

  // fc1 as given, and an fc2 back to `out` features.
  void mlp_int8(LinearInt8Params fc1, int64_t hidden, int64_t out) {
    const QuantizedRows weight = quantize(kGenericKernels, kFloat32, out, hidden, kInt8, true);
    PackWeightInt8Params w = {};
    w.weight_q = static_cast<const int8_t*>(weight.x_q);
    w.packed = reinterpret_cast<int8_t*>(guarded(packed_weight_int8_size(out, hidden, false)));
    w.in_features = hidden;
    w.out_features = out;
    kernels.pack_weight_int8(w, executor);
    LinearInt8Params fc2 = {};
    fc2.packed_weight = w.packed;
    fc2.weight_scale = weight.x_scale;
    fc2.rows = fc1.rows;
    fc2.in_features = hidden;
    fc2.out_features = out;
    fc2.y = guarded(fc2.rows * out * 4);
    kernels.mlp_int8({fc1, fc2}, executor);
    add(fc2.y, fc2.rows * out * 4);
    report("mlp_int8", fc1.x_dtype);
  }

  void counted(DType dtype) {
    norms(dtype, 64, 1024);
    gelu(dtype, 16384);
    quantize(dtype, 64, 1024, kInt8, false);
    attention(dtype, 1, 129, 1, 64, true);
    if (!kernels.linear_float32) return;
    if (dtype == kFloat32)
      linear<float>(97, 1024, 256);
    else
      linear<bf16>(97, 1024, 256);
    linear_int8(dtype, 97, 1024, 256, dtype == kFloat32);
  }

  void everything() {
    for (DType dtype : {kFloat32, kBFloat16, kFloat16}) {
      norms(dtype, 37, 40);
      norms(dtype, 3, 200);
      norms(dtype, 1, 1);
      gelu(dtype, 1);
      gelu(dtype, 5003);
      for (DType to : {kInt8, kFloat8E4M3}) {
        quantize(dtype, 37, 40, to, true);
        quantized_norm(dtype, 3, 203, to, to == kFloat8E4M3);
      }
      attention(dtype, 1, 1, 1, 8, false);
      attention(dtype, 2, 3, 2, 40, true);
      attention(dtype, 1, 67, 2, 64, true);
      attention(dtype, 1, 33, 1, 128, false);
      attention(dtype, 1, 103, 2, 40, true, {0, 67, 67, 70, 103});
    }
    if (!kernels.linear) return;
    linear<bf16>(1, 8, 1);
    linear<bf16>(33, 40, 56);
    linear<bf16>(70, 1088, 33);
    if (kernels.linear_float32) {
      linear<float>(1, 8, 1);
      linear<float>(33, 40, 56);
      linear<float>(70, 1088, 33);
    }
    if (!kernels.linear_int8) return;
    for (bool grouped : {false, true}) {
      linear_int8(kBFloat16, 1, 7, 1, grouped);
      linear_int8(kFloat32, 33, 40, 56, grouped);
      linear_int8(kFloat16, 70, 2113, 33, grouped);
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string unit = argv[1], mode = argv[2], plant = argc > 3 ? argv[3] : "";
  const Kernels* kernels = nullptr;
  for (const Kernels* const* k = supported_kernels(); *k; ++k)
    if (unit == (*k)->name) kernels = *k;
  if (!kernels) {
    printf("this machine has no %s\n", unit.c_str());
    return 77;
  }
  plant_race = plant == "race";
  const auto parallel_for = mode == "serial" || mode == "counted" ? run_serially
                            : mode == "threads"                   ? run_threads
                                                                  : run_shuffled;
  Driver driver{*kernels, {parallel_for, guarded_scratch, guarded_scratch}, plant == "bounds"};
  if (mode == "counted")
    driver.counted(plant == "float32" ? kFloat32 : kBFloat16);
  else
    driver.everything();
  return 0;
}
