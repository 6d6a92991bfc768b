// Runs csrc/cuda's kernels without torch, between guard pages, against float64, in any order of threads and blocks.
//
//   driver ORDER [bounds]     ORDER: ascending, descending, shuffled
//   bounds   tells a kernel of one row more than there is: the guard page must stop it
//
// Prints one line with a hash for each case; ends with status 1 and the reason where a launch or a comparison fails.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../guarded.h"
#include "cuda/device/launch.h"
#include "cuda/kernels.h"
#include "cuda_host.h"

using namespace internvit;
using namespace internvit::cuda;

namespace {

std::mt19937 random_bits(1);

// A tensor between guards, and its values as doubles.
struct Tensor {
  DType dtype;
  int64_t n;
  void* data;
  Tensor(DType dtype, int64_t n) : dtype(dtype), n(n), data(guarded(n * (dtype == kFloat32 ? 4 : 2))) {}

  double operator[](int64_t i) const {
    if (dtype == kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == kBFloat16 ? widened(bf16{bits}) : widened(f16{bits});
  }
  Tensor& fill(float scale, float shift) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = scale * (float(random_bits() % 2001) - 1000) / 500 + shift;
      if (dtype == kFloat32) static_cast<float*>(data)[i] = x;
      if (dtype == kBFloat16) static_cast<uint16_t*>(data)[i] = uint16_t(packed(x, 0, bf16{}));
      if (dtype == kFloat16) static_cast<uint16_t*>(data)[i] = uint16_t(packed(x, 0, f16{}));
    }
    return *this;
  }
  float* floats() const { return static_cast<float*>(data); }
  double eps() const { return dtype == kFloat32 ? 1.2e-7 : dtype == kBFloat16 ? 7.9e-3 : 9.8e-4; }
};

Tensor filled(DType dtype, int64_t n, float scale = 1, float shift = 0) { return Tensor(dtype, n).fill(scale, shift); }

struct Driver {
  const Kernels& kernels;
  DType dtype, residual_dtype;
  bool plant_bounds;
  std::string label;

  void check(const char* what, const char* error) {
    if (!error) return;
    printf("%s: %s: %s\n", label.c_str(), what, error);
    exit(1);
  }

  // Compares with the truth, by the largest of it, and prints a hash.
  void compare(const char* what, const Tensor& actual, const std::vector<double>& truth, double allowed) {
    double worst = 0, largest = 1e-30;
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < actual.n; ++i) {
      const double error = std::fabs(actual[i] - truth[size_t(i)]);
      worst = error <= worst ? worst : error;  // NaN counts
      largest = std::fmax(largest, std::fabs(truth[size_t(i)]));
      const double value = actual[i];
      uint64_t bits;
      memcpy(&bits, &value, 8);
      hash = (hash ^ bits) * 1099511628211u;
    }
    if (!(worst <= allowed * largest)) {
      printf("%s: %s: off by %g, allowed %g\n", label.c_str(), what, worst, allowed * largest);
      exit(1);
    }
    printf("%s %s %016llx\n", label.c_str(), what, static_cast<unsigned long long>(hash));
  }

  void fused_add_norm(int64_t rows, int64_t channels, bool layer_norm) {
    label = std::to_string(dtype) + "/" + std::to_string(residual_dtype) + " " + std::to_string(rows) + "x" +
            std::to_string(channels) + (layer_norm ? " layer_norm" : " rms_norm");
    const int64_t n = rows * channels;
    const Tensor x = filled(dtype, n), residual = filled(residual_dtype, n, 1, 3), gamma = filled(dtype, channels);
    const Tensor weight = filled(kFloat32, channels), bias = filled(dtype, channels), scale = filled(kFloat32, 1);
    Tensor out(residual_dtype, n), normed(dtype, n), mean(kFloat32, rows), rstd(kFloat32, rows);
    const bool wide = dtype == kFloat32;
    Jobs<NormParams> jobs = {};
    jobs.count = 1;
    NormParams& p = jobs.job[0];
    p = {x.data,
         channels,
         residual.data,
         channels,
         {gamma.data, wide},
         scale.floats(),
         rows,
         {weight.data, true},
         {layer_norm ? bias.data : nullptr, wide},
         out.data,
         normed.data,
         layer_norm ? mean.floats() : nullptr,
         rstd.floats(),
         rows,
         int32_t(channels),
         1e-6f,
         layer_norm,
         false,
         {},
         dtype,
         residual_dtype};
    if (plant_bounds) p.rows += 1;
    check("norm", kernels.norm(jobs, nullptr));

    std::vector<double> sum(static_cast<size_t>(n)), y(sum), x_hat(sum), inverse(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0, squares = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = r * channels + c;
        sum[size_t(i)] = residual[i] + scale[0] * gamma[c] * x[i];
        total += out[i];  // the statistics are those of what was stored
      }
      const double centre = layer_norm ? total / double(channels) : 0;
      for (int64_t c = 0; c < channels; ++c)
        squares += (out[r * channels + c] - centre) * (out[r * channels + c] - centre);
      inverse[size_t(r)] = 1 / std::sqrt(squares / double(channels) + 1e-6f);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = r * channels + c;
        x_hat[size_t(i)] = (out[i] - centre) * inverse[size_t(r)];
        y[size_t(i)] = x_hat[size_t(i)] * weight[c] + (layer_norm ? bias[c] : 0);
      }
    }
    compare("residual_out", out, sum, 2 * out.eps());
    compare("rstd", rstd, inverse, 1e-5);
    if (channels > 1) compare("normed", normed, y, 2 * normed.eps() + 1e-5);

    const Tensor grad_normed = filled(dtype, n), grad_out = filled(residual_dtype, n);
    Tensor grad_residual(residual_dtype, n), grad_branch(dtype, n);
    Tensor grads[] = {Tensor(kFloat32, channels), Tensor(kFloat32, channels), Tensor(dtype, channels)};
    Jobs<NormBackwardParams> back = {};
    back.count = 1;
    NormBackwardParams& b = back.job[0];
    b = {grad_normed.data,
         channels,
         grad_out.data,
         channels,
         out.data,
         channels,
         x.data,
         channels,
         {gamma.data, wide},
         scale.floats(),
         rows,
         {weight.data, true},
         layer_norm ? mean.floats() : nullptr,
         rstd.floats(),
         grad_residual.data,
         grad_branch.data,
         {{grads[0].data, true}, {grads[1].data, true}, {layer_norm ? grads[2].data : nullptr, wide}},
         nullptr,
         rows,
         int32_t(channels),
         0,
         dtype,
         residual_dtype};
    b.partial_rows = int32_t(backward_programs(rows, row_launch(channels, residual_dtype == kFloat32 ? 4 : 8), 2));
    const Tensor partial(kFloat32, b.partial_rows * kParameterKinds * channels);
    b.partial = partial.floats();
    check("norm_backward", kernels.norm_backward(back, nullptr));

    std::vector<double> g_residual(static_cast<size_t>(n)), g_branch(g_residual), sums[3];
    for (auto& s : sums) s.resize(static_cast<size_t>(channels));
    for (int64_t r = 0; r < rows; ++r) {
      double mean_g = 0, mean_gx = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = r * channels + c;
        mean_g += layer_norm ? grad_normed[i] * weight[c] / double(channels) : 0;
        mean_gx += grad_normed[i] * weight[c] * x_hat[size_t(i)] / double(channels);
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = r * channels + c;
        const double inner = grad_normed[i] * weight[c] - x_hat[size_t(i)] * mean_gx - mean_g;
        const double grad = inner * inverse[size_t(r)] + grad_out[i];
        g_residual[size_t(i)] = grad;
        g_branch[size_t(i)] = grad * gamma[c] * scale[0];
        sums[0][size_t(c)] += grad * x[i] * scale[0];
        sums[1][size_t(c)] += grad_normed[i] * x_hat[size_t(i)];
        sums[2][size_t(c)] += grad_normed[i];
      }
    }
    if (channels == 1) return;  // of one channel LayerNorm's gradient is 0 but for rounding
    compare("grad_residual", grad_residual, g_residual, 2 * grad_residual.eps() + 2e-5);
    compare("grad_branch", grad_branch, g_branch, 2 * grad_branch.eps() + 2e-5);
    for (int kind = 0; kind < (layer_norm ? 3 : 2); ++kind)
      compare("sums over rows", grads[kind], sums[kind], 2 * grads[kind].eps() + 2e-5);
  }

  void elementwise(int64_t rows, int64_t channels) {
    label = std::to_string(dtype) + " " + std::to_string(rows) + "x" + std::to_string(channels);
    const int64_t n = rows * channels;
    const Tensor x = filled(dtype, n), grad = filled(dtype, n), slope = filled(kFloat32, rows),
                 rstd = filled(kFloat32, rows);
    Tensor y(dtype, n), y_slope(dtype, n), added = filled(dtype, n);
    std::vector<double> gelu(static_cast<size_t>(n)), gelu_slope(gelu), expected(gelu);
    for (int64_t i = 0; i < n; ++i) {
      const double cdf = 0.5 * std::erfc(-x[i] / std::sqrt(2.0)), r = rstd[i / channels];
      gelu[size_t(i)] = x[i] * cdf;
      gelu_slope[size_t(i)] = grad[i] * (cdf + x[i] * std::exp(-x[i] * x[i] / 2) / std::sqrt(2 * M_PI));
      expected[size_t(i)] = added[i] - slope[i / channels] * r * r * r / double(channels) * x[i];
    }
    check("gelu", kernels.gelu({x.data, nullptr, y.data, n, dtype}, nullptr));
    check("gelu_backward", kernels.gelu({x.data, grad.data, y_slope.data, n, dtype}, nullptr));
    Jobs<QKNormStatsBackwardParams> jobs = {};
    jobs.count = 1;
    jobs.job[0] = {slope.floats(), rstd.floats(),     x.data, channels, added.data, channels,
                   rows,           int32_t(channels), dtype};
    check("qk_norm_stats_backward", kernels.qk_norm_stats_backward(jobs, nullptr));
    compare("gelu", y, gelu, 2 * y.eps());
    compare("gelu_backward", y_slope, gelu_slope, 2 * y.eps());
    compare("qk_norm_stats_backward", added, expected, 2 * y.eps());
  }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string order = argv[1];
  host::settings.order = order == "descending" ? host::Order::kDescending
                         : order == "shuffled" ? host::Order::kShuffled
                                               : host::Order::kAscending;
  const bool plant_bounds = argc > 2 && std::string(argv[2]) == "bounds";
  const std::pair<DType, DType> pairs[] = {{kBFloat16, kBFloat16},
#ifndef INTERNVIT_ONE_UNIT
                                           {kFloat32, kFloat32},
                                           {kFloat16, kFloat16},
                                           {kBFloat16, kFloat32},
                                           {kFloat16, kFloat32}
#endif
  };
  for (const auto& [dtype, residual_dtype] : pairs) {
#ifdef INTERNVIT_ONE_UNIT
    const Kernels& kernels = kBFloat16Kernels;
#else
    const Kernels& kernels = kernels_of(dtype, residual_dtype);
#endif
    Driver driver{kernels, dtype, residual_dtype, plant_bounds, ""};
    for (const bool layer_norm : {false, true}) {
      const std::pair<int64_t, int64_t> shapes[] = {{1, 1},    {3, 7},    {21, 40},  {17, 384}, {9, 1024},
                                                    {9, 1028}, {3, 1025}, {9, 3200}, {3, 4104}};
      for (const auto& [rows, channels] : shapes) driver.fused_add_norm(rows, channels, layer_norm);
    }
    if (dtype != residual_dtype) continue;
    driver.elementwise(1, 1);
    driver.elementwise(3, 40);
    driver.elementwise(5, 1025);
    driver.elementwise(2, 3200);
  }
  return 0;
}
