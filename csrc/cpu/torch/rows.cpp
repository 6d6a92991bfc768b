// The raw ops over rows on CPUs: how this backend runs the jobs of common/row_ops.h.
#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "common/row_ops.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

// A parameter in float32, whose gradient is summed in float32.
struct Vector {
  Floats kept;
  const float* parameter = nullptr;
  Vector() = default;
  Vector(const OptionalTensor& t, ScalarType) : kept(t), parameter(kept.data) {}

  static ScalarType grad_dtype(ScalarType, ScalarType) { return ScalarType::Float; }
  static float* grad(const Tensor& t) { return floats(t); }
};

struct Cpu {
  using Vector = internvit::Vector;

  static void norm(const char*, std::initializer_list<const NormJob<Vector>*> jobs) {
    for (const auto* job : jobs) kernels().norm(job->params, kExecutor);
  }
  static void norm_backward(const char*, std::initializer_list<NormBackwardJob<Vector>*> jobs) {
    for (auto* job : jobs) {
      job->sum_through(norm_backward_chunks(job->shape.rows));
      kernels().norm_backward(job->params, kExecutor);
    }
  }
  static void qk_norm_stats_backward(const char*, std::initializer_list<const QKNormStatsBackwardJob*> jobs) {
    for (const auto* job : jobs) kernels().qk_norm_stats_backward(job->params, kExecutor);
  }
  static void quantize_rows(const char*, const QuantizeRowsJob& job) { kernels().quantize_rows(job.params, kExecutor); }
  static void gelu(const char*, const Tensor&, const GeluParams& params) { kernels().gelu(params, kExecutor); }
};

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) { internvit::RowOps<internvit::Cpu>::implement(m); }
