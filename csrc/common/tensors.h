// What both bindings do with torch's tensors: rows with one stride, statistics as floats, outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "common/types.h"

namespace internvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of those that checks.h lets pass.
inline DType dtype_of(ScalarType dtype) {
  if (dtype == ScalarType::Char) return kInt8;
  if (dtype == ScalarType::Float8_e4m3fn) return kFloat8E4M3;
  return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

inline Tensor empty_like_of(const Tensor& t, ScalarType dtype) { return torch::stable::new_empty(t, t.sizes(), dtype); }
inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}
inline Tensor empty_grad(const Tensor& like) { return empty_floats(like, {0}); }

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// A vector as contiguous float32; its conversion costs one row.
struct Floats {
  Tensor kept;
  const float* data = nullptr;
  Floats() = default;
  explicit Floats(const OptionalTensor& t) {
    if (!t) return;
    kept = torch::stable::contiguous(converted(*t, ScalarType::Float));
    data = static_cast<const float*>(kept.data_ptr());
  }
};

// A tensor as rows of contiguous channels (its last `channel_dims` dimensions) with one stride; copied where it is not.
struct Rows {
  Tensor kept;
  void* data = nullptr;
  int64_t rows = 1, channels = 1, stride = 0;
  bool copied = false;

  Rows() = default;
  explicit Rows(const Tensor& t, int channel_dims = 1) : kept(t) {
    if (!collapse(channel_dims)) {
      kept = torch::stable::contiguous(t);
      copied = true;
      collapse(channel_dims);
    }
    data = kept.data_ptr();
  }
  explicit Rows(const OptionalTensor& t) {
    if (t) *this = Rows(*t);
  }

 private:
  bool collapse(int channel_dims) {
    const auto sizes = kept.sizes(), strides = kept.strides();
    const int64_t leading = int64_t(sizes.size()) - channel_dims;
    rows = channels = 1;
    bool regular = true;
    for (int64_t i = int64_t(sizes.size()) - 1; i >= leading; --i) {
      regular &= sizes[i] == 1 || strides[i] == channels;
      channels *= sizes[i];
    }
    stride = channels;
    bool first = true;
    for (int64_t i = leading - 1; i >= 0; --i) {
      if (sizes[i] != 1) {
        if (first) stride = strides[i];
        regular &= first || strides[i] == rows * stride;
        first = false;
      }
      rows *= sizes[i];
    }
    return regular || rows == 0;
  }
};

inline std::vector<int64_t> leading_sizes(const Tensor& t, int channel_dims = 1) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end() - channel_dims};
}

inline int64_t rows_per_image(const Tensor& t, int64_t rows) {
  const auto sizes = t.sizes();
  return sizes.size() > 1 && sizes[0] > 0 && rows > 0 ? rows / sizes[0] : 1;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

}  // namespace internvit
