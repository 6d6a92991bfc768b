// The raw ops torch.ops.internvit_cuda.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// No other folder of csrc/cuda knows torch. Schemas come from internvit/ops (setup.py writes schemas.h). Here is how
// this backend runs the jobs of common/row_ops.h: those of one call in one launch.
#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "common/row_ops.h"
#include "cuda/device/launch.h"
#include "cuda/kernels.h"
#include "cuda/torch/stream.h"
#include "schemas.h"

#ifndef INTERNVIT_LIBRARY  // the host harness (tests/proofs/native) builds these ops for CPU tensors, under a name of
                           // its own
#define INTERNVIT_LIBRARY internvit_cuda
#define INTERNVIT_DEVICE_KEY CUDA
#endif
#define INTERNVIT_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define INTERNVIT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace internvit::cuda {
namespace {

// A parameter as it is where its dtype is the activations' or float32, else in float32.
struct Vector {
  Tensor kept;
  Parameter parameter = {nullptr, true};
  Vector() = default;
  Vector(const OptionalTensor& t, ScalarType dtype) {
    if (!t) return;
    kept = torch::stable::contiguous(t->scalar_type() == dtype ? *t : converted(*t, ScalarType::Float));
    parameter = {kept.data_ptr(), kept.scalar_type() == ScalarType::Float};
  }

  static ScalarType grad_dtype(ScalarType parameter, ScalarType activations) {
    return parameter == activations ? activations : ScalarType::Float;
  }
  static ParameterGrad grad(const Tensor& t) { return {t.data_ptr(), t.scalar_type() == ScalarType::Float}; }
};

void check_launched(const char* op, const char* error) {
  STD_TORCH_CHECK(!error, "internvit_cuda: ", op, ": the launch failed: ", error ? error : "");
}

void check_channels(const char* op, int64_t channels) {
  STD_TORCH_CHECK(channels <= kMaxChannels, op, ": x must have 1 to ", kMaxChannels,
                  " channels on backend 'cuda', got ", channels, "; backends 'triton' and 'reference' take more");
}

template <class Params, class Job>
Jobs<Params> launched_together(std::initializer_list<Job*> given) {
  Jobs<Params> jobs = {};
  for (const Job* job : given) jobs.job[jobs.count++] = job->params;
  return jobs;
}

struct Cuda {
  using Vector = cuda::Vector;

  static void norm(const char* op, std::initializer_list<const NormJob<Vector>*> given) {
    const auto jobs = launched_together<NormParams>(given);
    const NormParams& first = jobs.job[0];
    check_channels(op, first.channels);
    if (first.rows == 0) return;
    const CurrentStream stream((*given.begin())->x);
    const Kernels& kernels = kernels_of(first.dtype, first.residual_dtype);
    check_launched(op, (first.quantized.x_q ? kernels.norm_quantized : kernels.norm)(jobs, stream.get()));
  }

  static void quantize_rows(const char* op, const QuantizeRowsJob& job) {
    check_channels(op, job.params.channels);
    if (job.params.rows == 0) return;
    const CurrentStream stream(job.x);
    check_launched(op, kernels_of(job.params.dtype, job.params.dtype).quantize_rows(job.params, stream.get()));
  }

  static void norm_backward(const char* op, std::initializer_list<NormBackwardJob<Vector>*> given) {
    const NormBackwardJob<Vector>& first = **given.begin();
    check_channels(op, first.shape.channels);
    const DType residual_dtype = first.params.residual_dtype;
    const CurrentStream stream(first.like);
    const RowLaunch rule = row_launch(first.shape.channels, residual_dtype == kFloat32 ? 4 : 8);
    const int64_t resident = stream.multiprocessors() * int64_t(resident_blocks(residual_dtype, first.shape.channels));
    for (auto* job : given) job->sum_through(backward_programs(job->shape.rows, rule, resident));
    const auto jobs = launched_together<NormBackwardParams>(given);
    check_launched(op, kernels_of(first.params.dtype, residual_dtype).norm_backward(jobs, stream.get()));
  }

  static void qk_norm_stats_backward(const char* op, std::initializer_list<const QKNormStatsBackwardJob*> given) {
    const auto jobs = launched_together<QKNormStatsBackwardParams>(given);
    const QKNormStatsBackwardParams& first = jobs.job[0];
    check_channels(op, first.channels);
    if (first.rows == 0) return;
    const CurrentStream stream((*given.begin())->x);
    check_launched(op, kernels_of(first.dtype, first.dtype).qk_norm_stats_backward(jobs, stream.get()));
  }

  static void gelu(const char* op, const Tensor& like, const GeluParams& params) {
    if (params.size == 0) return;
    const CurrentStream stream(like);
    check_launched(op, kernels_of(params.dtype, params.dtype).gelu(params, stream.get()));
  }
};

}  // namespace
}  // namespace internvit::cuda

INTERNVIT_DEFINE(INTERNVIT_LIBRARY, m) {
  for (const char* schema : internvit::kSchemas) m.def(schema);
}

INTERNVIT_IMPLEMENT(INTERNVIT_LIBRARY, INTERNVIT_DEVICE_KEY, m) {
  internvit::RowOps<internvit::cuda::Cuda>::implement(m);
}
