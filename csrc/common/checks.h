// What raw ops require of their arguments, once for both libraries. Exported graphs and C++ hosts call raw ops without
// the validation of internvit/ops, and kernels trust every size and dtype: what passes here is safe to read and to
// write. An error names the op and the argument, what was expected and what came.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/tensors.h"

namespace internvit {

template <class Sizes>
std::string list_of(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

template <class Sizes, class Others>
bool equal(const Sizes& a, const Others& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device:") + std::to_string(t.get_device_index());
}

inline bool is_storage_type(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The checks of one call: the other arguments are compared with its first tensor x, named `name`.
class Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& x) : op_(op), name_(name), x_(x) {
    STD_TORCH_CHECK(is_storage_type(x.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16, got ",
                    x.scalar_type());
  }

  // x [..., C].
  void rows() const {
    STD_TORCH_CHECK(x_.dim() > 0 && is_channel_count(x_.size(x_.dim() - 1)), op_, ": ", name_,
                    " must have a last dimension of 1 to 2^31 - 1, got shape ", list_of(x_.sizes()));
  }
  // x [B, N, H, D], or [total, H, D] of packed sequences.
  void heads(bool packed = false) const {
    const int64_t dims = packed ? 3 : 4;
    STD_TORCH_CHECK(x_.dim() == dims && is_channel_count(x_.size(dims - 2)) && is_channel_count(x_.size(dims - 1)) &&
                        is_channel_count(x_.size(dims - 2) * x_.size(dims - 1)),
                    op_, ": ", name_, " must have shape ", packed ? "[total, H, D] beside cu_seqlens" : "[B, N, H, D]",
                    " with H, D >= 1, got ", list_of(x_.sizes()));
  }
  // Contiguous int32 [sequences + 1] from 0 to the number of tokens, not decreasing; read here, so on the CPU.
  void cu_seqlens(const char* name, const OptionalTensor& t, int64_t tokens) const {
    if (!t) return;
    device(name, *t);
    dtype(name, *t, ScalarType::Int);
    STD_TORCH_CHECK(t->dim() == 1 && t->numel() >= 1, op_, ": ", name, " must have shape [B + 1], got ",
                    list_of(t->sizes()));
    const int32_t* ends = static_cast<const int32_t*>(t->data_ptr());
    const int64_t last = t->numel() - 1, step = t->stride(0);
    STD_TORCH_CHECK(ends[0] == 0 && ends[last * step] == tokens, op_, ": ", name, " must begin with 0 and end with ",
                    tokens, " (tokens), got ", ends[0], " and ", ends[last * step]);
    for (int64_t i = 0; i < last; ++i)
      STD_TORCH_CHECK(ends[i * step] <= ends[(i + 1) * step], op_, ": ", name, " must not decrease, got ",
                      ends[i * step], " before ", ends[(i + 1) * step]);
  }

  void key_sequences(const OptionalTensor& queries, const OptionalTensor& keys, bool qk_norm) const {
    if (!keys) return;
    STD_TORCH_CHECK(bool(queries), op_, ": cu_seqlens must be given beside cu_seqlens_k, got None");
    STD_TORCH_CHECK(!qk_norm, op_, ": cu_seqlens_k must be None with QK-norm inside, whose queries and keys are one ",
                    "token's");
    shape("cu_seqlens_k", *keys, queries->sizes());
  }

  void device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == x_.device(), op_, ": ", name, " must be on ", name_, "'s device ", device_of(x_),
                    ", got ", device_of(t));
  }
  void dtype(const char* name, const Tensor& t, ScalarType expected) const {
    STD_TORCH_CHECK(t.scalar_type() == expected, op_, ": ", name, " must be ", expected, ", got ", t.scalar_type());
  }
  template <class Sizes>
  void shape(const char* name, const Tensor& t, const Sizes& expected) const {
    device(name, t);
    STD_TORCH_CHECK(equal(t.sizes(), expected), op_, ": ", name, " must have shape ", list_of(expected), ", got ",
                    list_of(t.sizes()));
  }

  // Keys and values of heads: x's shape but for the tokens, where they may have a length of their own.
  void keys(const Tensor& k, const Tensor& v, bool own_length) const {
    const int64_t tokens = x_.dim() - 3;
    std::vector<int64_t> expected(x_.sizes().begin(), x_.sizes().end());
    if (own_length && k.dim() == x_.dim()) expected[size_t(tokens)] = k.size(tokens);
    shape("k", k, expected);
    dtype("k", k, x_.scalar_type());
    shape("v", v, expected);
    dtype("v", v, x_.scalar_type());
  }

  // x's shape, dtype and device.
  void like_x(const char* name, const Tensor& t) const {
    shape(name, t, x_.sizes());
    dtype(name, t, x_.scalar_type());
  }
  // Written through its strides: two elements must not share a place.
  void output_like_x(const char* name, const Tensor& t) const { output(name, t, x_); }
  void output(const char* name, const Tensor& t, const Tensor& like) const {
    shape(name, t, like.sizes());
    dtype(name, t, like.scalar_type());
    for (int64_t i = 0; i < t.dim(); ++i)
      STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) != 0, op_, ": ", name,
                      " is written and must have an element for each index, got strides ", list_of(t.strides()));
  }
  // The branch's own tensors have the dtype that `source` gives; the residual stream's may be float32 beside it.
  void branch_dtype(const char* name, const Tensor& t, const char* source, ScalarType expected) const {
    STD_TORCH_CHECK(t.scalar_type() == expected, op_, ": ", name, " and ", source, " must agree, got ", t.scalar_type(),
                    " and ", expected);
  }
  void residual_dtype(const char* name, const Tensor& t, const char* source, ScalarType branch) const {
    STD_TORCH_CHECK(t.scalar_type() == branch || t.scalar_type() == ScalarType::Float, op_, ": ", name, " must be of ",
                    source, "'s dtype ", branch, " or Float, got ", t.scalar_type());
  }

  // Parameters and statistics: any floating dtype; kernels get them converted.
  template <class Sizes>
  void floating(const char* name, const OptionalTensor& t, const Sizes& expected) const {
    if (!t) return;
    shape(name, *t, expected);
    STD_TORCH_CHECK(is_storage_type(t->scalar_type()) || t->scalar_type() == ScalarType::Double, op_, ": ", name,
                    " must be float32, bfloat16, float16 or float64, got ", t->scalar_type());
  }
  void parameter(const char* name, const OptionalTensor& t, int64_t length) const {
    floating(name, t, std::vector<int64_t>{length});
  }
  // A norm's bias, of the dtype of its weight.
  void bias(const OptionalTensor& t, const Tensor& weight) const {
    if (!t) return;
    parameter("bias", t, weight.size(0));
    STD_TORCH_CHECK(t->scalar_type() == weight.scalar_type(), op_, ": bias must have weight's dtype ",
                    weight.scalar_type(), ", got ", t->scalar_type());
  }
  // One factor for each image of x [B, ..., C].
  void row_scale(const OptionalTensor& t) const {
    STD_TORCH_CHECK(!t || x_.dim() >= 2, op_, ": row_scale needs ", name_, " of shape [B, ..., C], got ",
                    list_of(x_.sizes()));
    if (t) parameter("row_scale", t, x_.size(0));
  }
  void given(const char* name, const OptionalTensor& t, const char* why) const {
    STD_TORCH_CHECK(t, op_, ": ", name, " must be given ", why);
  }

  void eps(double eps) const { STD_TORCH_CHECK(eps >= 0, op_, ": eps must be a number >= 0, got ", eps); }
  void scale(double scale) const {
    STD_TORCH_CHECK(std::isfinite(scale), op_, ": scale must be a finite number, got ", scale);
  }
  void one_of(const char* name, const std::string& value, const char* first, const char* second) const {
    STD_TORCH_CHECK(value == first || value == second, op_, ": ", name, " must be '", first, "' or '", second,
                    "', got '", value, "'");
  }
  void rounding(const std::string& value) const { one_of("rounding", value, "fused", "reference"); }
  void quantized(bool symmetric, ScalarType dtype) const {
    STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, op_,
                    ": dtype must be int8 or float8_e4m3fn, got ", dtype);
    STD_TORCH_CHECK(symmetric || dtype == ScalarType::Char, op_,
                    ": symmetric must be True for dtype float8_e4m3fn, which has no zero point");
  }
  void output_mask(const std::vector<bool>& mask, size_t length) const {
    STD_TORCH_CHECK(mask.size() == length, op_, ": output_mask must have ", length, " elements, got ", mask.size());
  }

 private:
  static bool is_channel_count(int64_t n) { return n >= 1 && n <= std::numeric_limits<int32_t>::max(); }

  const char* op_;
  const char* name_;
  const Tensor& x_;
};

}  // namespace internvit
