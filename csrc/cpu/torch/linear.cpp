// The raw ops of a Linear whose weight is packed for this machine's products.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

// Whether this instruction set has a GEMM of its own for that dtype.
bool packs_linear(ScalarType dtype) {
  if (dtype == ScalarType::Float) return kernels().linear_float32;
  return dtype == ScalarType::BFloat16 && kernels().linear;
}

// The checks of both raw ops: bfloat16 from AVX2 on, float32 on AVX2 alone.
void check_packs(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(packs_linear(t.scalar_type()), op, ": ", name,
                  " must be bfloat16, on a machine with AVX2, or float32, on one with AVX2 and not AVX-512; got ",
                  t.scalar_type(), " on ", kernels().name);
}

// What a packed weight ends in: the kernels' layout is padded, and does not say of what shape it was made, nor for what
// unit.
struct PackedShape {
  int64_t out_features, in_features, layout;
};

int64_t shape_elements(const Tensor& packed) { return int64_t(sizeof(PackedShape)) / packed.element_size(); }

char* packed_shape(const Tensor& packed) {
  return static_cast<char*>(packed.data_ptr()) + packed.numel() * packed.element_size() - int64_t(sizeof(PackedShape));
}

template <class T>
PackWeightParamsOf<T> pack_params(const Tensor& weight, const Tensor& packed) {
  return {static_cast<const T*>(weight.data_ptr()), static_cast<T*>(packed.data_ptr()), weight.size(1), weight.size(0)};
}

Tensor pack_weight(const Tensor& weight) {
  check_packs("pack_weight", "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0,
                  "pack_weight: weight must have shape [out_features, in_features], both at least 1, got ",
                  list_of(weight.sizes()));
  const Tensor w = torch::stable::contiguous(weight);
  const PackedShape shape = {w.size(0), w.size(1), kernels().weight_layout};
  Tensor packed =
      torch::stable::new_empty(w, {packed_weight_size(shape.out_features, shape.in_features) + shape_elements(w)});
  if (w.scalar_type() == ScalarType::Float) {
    kernels().pack_weight_float32(pack_params<float>(w, packed), kExecutor);
  } else {
    kernels().pack_weight(pack_params<bf16>(w, packed), kExecutor);
  }
  std::memcpy(packed_shape(packed), &shape, sizeof shape);
  return packed;
}

void check_linear_packed(const Tensor& x, const Tensor& packed_weight, int64_t out_features, const OptionalTensor& bias,
                         const OptionalTensor& residual) {
  const char* op = "linear_packed";
  check_packs(op, "x", x);
  const Checks check(op, "x", x);
  check.rows();
  check.device("packed_weight", packed_weight);
  check.dtype("packed_weight", packed_weight, x.scalar_type());
  const int64_t tail = shape_elements(packed_weight);
  STD_TORCH_CHECK(packed_weight.dim() == 1 && packed_weight.numel() > tail && packed_weight.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(packed_weight.data_ptr()) % 64 == 0,
                  op,
                  ": packed_weight must be as pack_weight returns it, contiguous from a multiple of 64 bytes on, got ",
                  "shape ", list_of(packed_weight.sizes()), " and strides ", list_of(packed_weight.strides()));
  PackedShape shape;
  std::memcpy(&shape, packed_shape(packed_weight), sizeof shape);
  const int64_t most = packed_weight.numel(), in_features = x.size(x.dim() - 1);
  STD_TORCH_CHECK(shape.out_features >= 1 && shape.out_features <= most && shape.in_features >= 1 &&
                      shape.in_features <= most / shape.out_features &&
                      packed_weight_size(shape.out_features, shape.in_features) + tail == most,
                  op, ": packed_weight must be as pack_weight returns it, got ", most, " elements of something else");
  STD_TORCH_CHECK(shape.layout == kernels().weight_layout, op,
                  ": packed_weight must be packed for the instruction set in use, ", kernels().name,
                  ", got one of layout ", shape.layout);
  STD_TORCH_CHECK(in_features == shape.in_features, op, ": x must have packed_weight's ", shape.in_features,
                  " input features, got shape ", list_of(x.sizes()));
  STD_TORCH_CHECK(out_features == shape.out_features, op, ": out_features must be packed_weight's ", shape.out_features,
                  ", got ", out_features);
  check.parameter("bias", bias, out_features);
  if (!residual) return;
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(out_features);
  check.shape("residual", *residual, sizes);
  check.dtype("residual", *residual, x.scalar_type());
}

// Where the operands lie; `bias` in float32.
template <class T>
LinearParamsOf<T> linear_params(const Rows& x, const Tensor& packed_weight, const float* bias, const Rows& residual,
                                const Tensor& y, bool gelu) {
  LinearParamsOf<T> p = {};
  p.x = static_cast<const T*>(x.data);
  p.x_stride = x.stride;
  p.packed_weight = static_cast<const T*>(packed_weight.data_ptr());
  p.bias = bias;
  p.residual = static_cast<const T*>(residual.data);
  p.residual_stride = residual.stride;
  p.y = static_cast<T*>(y.data_ptr());
  p.rows = x.rows;
  p.in_features = x.channels;
  p.out_features = y.size(y.dim() - 1);
  p.gelu = gelu;
  return p;
}

Tensor linear_packed(const Tensor& x, const Tensor& packed_weight, int64_t out_features, const OptionalTensor& bias,
                     const OptionalTensor& residual, bool gelu) {
  check_linear_packed(x, packed_weight, out_features, bias, residual);
  const Rows in(x), res(residual);
  const Floats b{bias};
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(out_features);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (in.rows == 0) return y;
  if (x.scalar_type() == ScalarType::Float) {
    kernels().linear_float32(linear_params<float>(in, packed_weight, b.data, res, y, gelu), kExecutor);
  } else {
    kernels().linear(linear_params<bf16>(in, packed_weight, b.data, res, y, gelu), kExecutor);
  }
  return y;
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CompositeExplicitAutograd, m) {
  m.impl("packs_linear", TORCH_BOX(&internvit::packs_linear));
}

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&internvit::pack_weight));
  m.impl("linear_packed", TORCH_BOX(&internvit::linear_packed));
}
