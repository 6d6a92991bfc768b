// The arguments of raw ops as kernels take them, and the checks behind those of internvit/ops: each names the argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../tensors.h"
#include "kernels.h"

namespace internvit::cuda {

inline void check_launched(const char* op, const char* error) {
  STD_TORCH_CHECK(!error, "internvit_cuda: ", op, ": the launch failed: ", error ? error : "");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, got ", t.scalar_type());
      return kFloat32;
  }
}

inline int width_of(DType dtype) { return dtype == kFloat32 ? 4 : 8; }

inline void check_rows(const char* op, const char* name, const Rows& t, const Rows& like) {
  STD_TORCH_CHECK(t.rows == like.rows && t.channels == like.channels, op, ": ", name, " must have ", like.rows,
                  " rows of ", like.channels, " channels, got ", t.rows, " of ", t.channels);
}
inline void check_numel(const char* op, const char* name, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel, op, ": ", name, " must have ", numel, " elements, got ", t.numel());
}
inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on device ",
                  like.get_device_index(), ", got ", t.get_device_index());
}
inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", t.scalar_type());
}
inline void check_channels(const char* op, int64_t channels) {
  STD_TORCH_CHECK(channels >= 1 && channels <= kMaxChannels, op, ": x must have 1 to ", kMaxChannels,
                  " channels on backend 'cuda', got ", channels, "; backends 'triton' and 'reference' take more");
}

// A parameter [C] as it is where its dtype is the activations' or float32, else in float32.
struct Vector {
  Tensor kept;
  Parameter parameter = {nullptr, true};
  Vector() = default;
  Vector(const char* op, const char* name, const Maybe& t, const Tensor& x, int64_t channels) {
    if (!t) return;
    check_same(op, name, *t, x);
    check_numel(op, name, *t, channels);
    kept = torch::stable::contiguous(t->scalar_type() == x.scalar_type() ? *t : converted(*t, ScalarType::Float));
    parameter = {kept.data_ptr(), kept.scalar_type() == ScalarType::Float};
  }
};

struct Statistics : Floats {
  Statistics(const char* op, const char* name, const Maybe& t, const Tensor& x, int64_t count) : Floats(t) {
    if (!t) return;
    check_same(op, name, *t, x);
    check_numel(op, name, *t, count);
  }
};

}  // namespace internvit::cuda
