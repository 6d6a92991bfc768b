// The raw ops of int8 Linears: rows quantised with a scale each, weights packed for this machine's products.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

constexpr int64_t kMostDepth = 65536;  // sums of 255 * 128 stay in int32

// Whether the instruction set in use multiplies int8: AVX-512 with VNNI and BF16.
bool multiplies_int8() { return kernels().linear_int8 != nullptr; }

void check_int8(const char* op) {
  STD_TORCH_CHECK(multiplies_int8(), op, ": needs a machine with AVX-512 VNNI and BF16, got ", kernels().name);
}

void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, " on cpu, got ",
                  t.scalar_type(), " on ", device_of(t));
}

void check_sizes(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(equal(t.sizes(), sizes), op, ": ", name, " must have shape ", list_of(sizes), ", got ",
                  list_of(t.sizes()));
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows_int8(const Tensor& x, bool symmetric) {
  check_int8("quantize_rows_int8");
  Checks("quantize_rows_int8", "x", x).rows();
  const Rows in(x);
  Tensor x_q = empty_like_of(x, ScalarType::Char), x_scale = empty_floats(x, leading_sizes(x));
  Tensor x_zero = empty_like_of(x_scale, ScalarType::Int);
  QuantizeRowsParams p = {};
  p.x = in.data;
  p.x_stride = in.stride;
  p.x_q = static_cast<int8_t*>(x_q.data_ptr());
  p.x_scale = floats(x_scale);
  p.x_zero = static_cast<int32_t*>(x_zero.data_ptr());
  p.rows = in.rows;
  p.channels = in.channels;
  p.dtype = dtype_of(x);
  p.symmetric = symmetric;
  kernels().quantize_rows(p, kExecutor);
  return {x_q, x_scale, x_zero};
}

// What a packed weight ends in: the kernels' layout is padded, and does not say of what shape it was made.
struct PackedShape {
  int64_t out_features, in_features;
};

int8_t* packed_shape(const Tensor& packed) {
  return static_cast<int8_t*>(packed.data_ptr()) + packed.numel() - int64_t(sizeof(PackedShape));
}

Tensor pack_weight_int8(const Tensor& weight_q) {
  const char* op = "pack_weight_int8";
  check_int8(op);
  check_tensor(op, "weight_q", weight_q, ScalarType::Char);
  STD_TORCH_CHECK(weight_q.dim() == 2 && weight_q.numel() > 0 && weight_q.size(1) <= kMostDepth, op,
                  ": weight_q must have shape [out_features, in_features], both at least 1 and in_features at most ",
                  kMostDepth, ", got ", list_of(weight_q.sizes()));
  const Tensor w = torch::stable::contiguous(weight_q);
  const PackedShape shape = {w.size(0), w.size(1)};
  Tensor packed = torch::stable::new_empty(
      w, {packed_weight_int8_size(shape.out_features, shape.in_features) + int64_t(sizeof shape)});
  kernels().pack_weight_int8({static_cast<const int8_t*>(w.data_ptr()), static_cast<int8_t*>(packed.data_ptr()),
                              shape.in_features, shape.out_features},
                             kExecutor);
  std::memcpy(packed_shape(packed), &shape, sizeof shape);
  return packed;
}

PackedShape shape_of_packed(const char* op, const Tensor& packed) {
  check_tensor(op, "packed_weight", packed, ScalarType::Char);
  PackedShape shape = {0, 0};
  const int64_t most = packed.numel(), tail = int64_t(sizeof shape);
  const bool laid_out = packed.dim() == 1 && most > tail && packed.is_contiguous() &&
                        reinterpret_cast<uintptr_t>(packed.data_ptr()) % 64 == 0;
  if (laid_out) std::memcpy(&shape, packed_shape(packed), sizeof shape);
  STD_TORCH_CHECK(laid_out && shape.out_features >= 1 && shape.out_features <= most && shape.in_features >= 1 &&
                      shape.in_features <= most / shape.out_features && shape.in_features <= kMostDepth &&
                      packed_weight_int8_size(shape.out_features, shape.in_features) + tail == most,
                  op, ": packed_weight must be as pack_weight_int8 returns it, got shape ", list_of(packed.sizes()));
  return shape;
}

// What both Linears have beside x: checked, and laid out as the kernel reads it.
struct PackedLinear {
  PackedShape shape;
  Floats scale, bias;

  PackedLinear(const char* op, const char* name, const Tensor& x, const Tensor& packed_weight,
               const Tensor& weight_scale, const OptionalTensor& b)
      : shape(shape_of_packed(op, packed_weight)), scale(OptionalTensor(weight_scale)), bias(b) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == shape.in_features, op, ": ", name,
                    " must have packed_weight's ", shape.in_features, " input features, got shape ",
                    list_of(x.sizes()));
    check_tensor(op, "weight_scale", weight_scale, ScalarType::Float);
    check_sizes(op, "weight_scale", weight_scale, {shape.out_features});
    if (!b) return;
    check_tensor(op, "bias", *b, ScalarType::Float);
    check_sizes(op, "bias", *b, {shape.out_features});
  }
};

Tensor run_linear(LinearInt8Params p, const PackedLinear& linear, const Tensor& x, const Tensor& packed_weight,
                  bool gelu, ScalarType dtype) {
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(linear.shape.out_features);
  Tensor y = torch::stable::new_empty(x, sizes, dtype);
  p.packed_weight = static_cast<const int8_t*>(packed_weight.data_ptr());
  p.weight_scale = linear.scale.data;
  p.bias = linear.bias.data;
  p.y = y.data_ptr();
  p.in_features = linear.shape.in_features;
  p.out_features = linear.shape.out_features;
  p.dtype = dtype_of(y);
  p.gelu = gelu;
  if (p.rows > 0) kernels().linear_int8(p, kExecutor);
  return y;
}

Tensor linear_int8_packed(const Tensor& x_q, const Tensor& x_scale, const Tensor& packed_weight,
                          const Tensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& x_zero,
                          bool gelu, ScalarType dtype) {
  const char* op = "linear_int8_packed";
  check_int8(op);
  check_tensor(op, "x_q", x_q, ScalarType::Char);
  const PackedLinear linear(op, "x_q", x_q, packed_weight, weight_scale, bias);
  check_tensor(op, "x_scale", x_scale, ScalarType::Float);
  check_sizes(op, "x_scale", x_scale, leading_sizes(x_q));
  if (x_zero) {
    check_tensor(op, "x_zero", *x_zero, ScalarType::Int);
    check_sizes(op, "x_zero", *x_zero, leading_sizes(x_q));
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": dtype must be Float or BFloat16, got ", dtype);
  const Rows in(x_q);
  const Floats row_scale{OptionalTensor(x_scale)};
  const Tensor zero = x_zero ? torch::stable::contiguous(*x_zero) : Tensor();
  LinearInt8Params p = {};
  p.x_q = static_cast<const int8_t*>(in.data);
  p.x_stride = in.stride;
  p.x_scale = row_scale.data;
  p.x_zero = x_zero ? static_cast<const int32_t*>(zero.data_ptr()) : nullptr;
  p.rows = in.rows;
  return run_linear(p, linear, x_q, packed_weight, gelu, dtype);
}

// x is quantised on the way, as by quantize_rows_int8 without symmetry.
Tensor linear_int8_dynamic(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                           const OptionalTensor& bias, bool gelu) {
  const char* op = "linear_int8_dynamic";
  check_int8(op);
  STD_TORCH_CHECK(x.is_cpu() && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16), op,
                  ": x must be Float or BFloat16 on cpu, got ", x.scalar_type(), " on ", device_of(x));
  const PackedLinear linear(op, "x", x, packed_weight, weight_scale, bias);
  const Rows in(x);
  LinearInt8Params p = {};
  p.x = in.data;
  p.x_dtype = dtype_of(x);
  p.x_stride = in.stride;
  p.rows = in.rows;
  return run_linear(p, linear, x, packed_weight, gelu, x.scalar_type());
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CompositeExplicitAutograd, m) {
  m.impl("multiplies_int8", TORCH_BOX(&internvit::multiplies_int8));
}

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("quantize_rows_int8", TORCH_BOX(&internvit::quantize_rows_int8));
  m.impl("pack_weight_int8", TORCH_BOX(&internvit::pack_weight_int8));
  m.impl("linear_int8_packed", TORCH_BOX(&internvit::linear_int8_packed));
  m.impl("linear_int8_dynamic", TORCH_BOX(&internvit::linear_int8_dynamic));
}
