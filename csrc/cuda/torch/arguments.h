// The arguments of raw ops as kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/op_checks.h"
#include "common/tensors.h"
#include "cuda/kernels.h"

namespace internvit::cuda {

inline void check_launched(const char* op, const char* error) {
  STD_TORCH_CHECK(!error, "internvit_cuda: ", op, ": the launch failed: ", error ? error : "");
}

inline DType dtype_of(ScalarType dtype) {  // of those that checks let pass
  return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
}

inline int width_of(DType dtype) { return dtype == kFloat32 ? 4 : 8; }

inline void check_channels(const char* op, int64_t channels) {
  STD_TORCH_CHECK(channels >= 1 && channels <= kMaxChannels, op, ": x must have 1 to ", kMaxChannels,
                  " channels on backend 'cuda', got ", channels, "; backends 'triton' and 'reference' take more");
}

// A parameter [C] as it is where its dtype is the activations' or float32, else in float32.
struct Vector {
  Tensor kept;
  Parameter parameter = {nullptr, true};
  Vector() = default;
  Vector(const OptionalTensor& t, ScalarType dtype) {
    if (!t) return;
    kept = torch::stable::contiguous(t->scalar_type() == dtype ? *t : converted(*t, ScalarType::Float));
    parameter = {kept.data_ptr(), kept.scalar_type() == ScalarType::Float};
  }
};

}  // namespace internvit::cuda
