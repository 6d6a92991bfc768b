// The raw ops of int8 Linears: weights packed for this machine's products, and the products.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/torch/bindings.h"

namespace internvit {
namespace {

constexpr int64_t kMostDepth = 65536;  // sums of 255 * 128 stay in int32

// Whether the instruction set in use multiplies int8: AVX2.
bool multiplies_int8() { return int8_kernels().linear_int8 != nullptr; }

void check_int8(const char* op) {
  STD_TORCH_CHECK(multiplies_int8(), op, ": needs a machine with AVX2, got ", kernels().name);
}

void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, " on cpu, got ",
                  t.scalar_type(), " on ", device_of(t));
}

void check_sizes(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(equal(t.sizes(), sizes), op, ": ", name, " must have shape ", list_of(sizes), ", got ",
                  list_of(t.sizes()));
}

// What a packed weight ends in: the kernels' layout is padded, and does not say of what shape it was made, nor for what
// unit.
struct PackedShape {
  int64_t out_features, in_features, grouped, layout;
};

int8_t* packed_shape(const Tensor& packed) {
  return static_cast<int8_t*>(packed.data_ptr()) + packed.numel() - int64_t(sizeof(PackedShape));
}

Tensor pack_weight_int8(const Tensor& weight_q, const OptionalTensor& group_ratio) {
  const char* op = "pack_weight_int8";
  check_int8(op);
  check_tensor(op, "weight_q", weight_q, ScalarType::Char);
  STD_TORCH_CHECK(weight_q.dim() == 2 && weight_q.numel() > 0 && weight_q.size(1) <= kMostDepth, op,
                  ": weight_q must have shape [out_features, in_features], both at least 1 and in_features at most ",
                  kMostDepth, ", got ", list_of(weight_q.sizes()));
  const Tensor w = torch::stable::contiguous(weight_q);
  const PackedShape shape = {w.size(0), w.size(1), group_ratio ? 1 : 0, int8_kernels().weight_layout};
  if (group_ratio) {
    check_tensor(op, "group_ratio", *group_ratio, ScalarType::Float);
    check_sizes(op, "group_ratio", *group_ratio,
                {shape.out_features, (shape.in_features + kInt8GroupSize - 1) / kInt8GroupSize});
  }
  const Floats ratio{group_ratio};
  const int64_t bytes = packed_weight_int8_size(shape.out_features, shape.in_features, shape.grouped);
  Tensor packed = torch::stable::new_empty(w, {bytes + int64_t(sizeof shape)});
  int8_kernels().pack_weight_int8({static_cast<const int8_t*>(w.data_ptr()), ratio.data,
                                   static_cast<int8_t*>(packed.data_ptr()), shape.in_features, shape.out_features},
                                  kExecutor);
  std::memcpy(packed_shape(packed), &shape, sizeof shape);
  return packed;
}

PackedShape shape_of_packed(const char* op, const char* name, const Tensor& packed) {
  check_tensor(op, name, packed, ScalarType::Char);
  PackedShape shape = {0, 0, 0, 0};
  const int64_t most = packed.numel(), tail = int64_t(sizeof shape);
  const bool laid_out = packed.dim() == 1 && most > tail && packed.is_contiguous() &&
                        reinterpret_cast<uintptr_t>(packed.data_ptr()) % 64 == 0;
  if (laid_out) std::memcpy(&shape, packed_shape(packed), sizeof shape);
  STD_TORCH_CHECK(laid_out && shape.out_features >= 1 && shape.out_features <= most && shape.in_features >= 1 &&
                      shape.in_features <= most / shape.out_features && shape.in_features <= kMostDepth &&
                      (shape.grouped == 0 || shape.grouped == 1) &&
                      packed_weight_int8_size(shape.out_features, shape.in_features, shape.grouped) + tail == most,
                  op, ": ", name, " must be as pack_weight_int8 returns it, got shape ", list_of(packed.sizes()));
  STD_TORCH_CHECK(shape.layout == int8_kernels().weight_layout, op, ": ", name,
                  " must be packed for the instruction set in use, ", int8_kernels().name, ", got one of layout ",
                  shape.layout);
  return shape;
}

// A Linear's weight, its scales and bias: checked, and laid out as the kernel reads them.
struct ArgumentNames {
  const char *weight, *scale, *bias;
};
constexpr ArgumentNames kLinearNames = {"packed_weight", "weight_scale", "bias"};

struct PackedLinear {
  PackedShape shape;
  const int8_t* weight;
  Floats scale, bias;

  PackedLinear(const char* op, const Tensor& packed_weight, const Tensor& weight_scale, const OptionalTensor& b,
               const ArgumentNames& names = kLinearNames)
      : shape(shape_of_packed(op, names.weight, packed_weight)),
        weight(static_cast<const int8_t*>(packed_weight.data_ptr())),
        scale(OptionalTensor(weight_scale)),
        bias(b) {
    check_tensor(op, names.scale, weight_scale, ScalarType::Float);
    check_sizes(op, names.scale, weight_scale, {shape.out_features});
    if (!b) return;
    check_tensor(op, names.bias, *b, ScalarType::Float);
    check_sizes(op, names.bias, *b, {shape.out_features});
  }

  LinearInt8Params params() const {
    LinearInt8Params p = {};
    p.packed_weight = weight;
    p.weight_scale = scale.data;
    p.bias = bias.data;
    p.in_features = shape.in_features;
    p.out_features = shape.out_features;
    p.grouped = shape.grouped != 0;
    return p;
  }
};

// x of a Linear: int8 with a scale and perhaps a zero point for each row, or float rows that the kernel quantises.
struct Input {
  Rows x;
  Floats scale;
  Tensor zero;
  DType dtype = kFloat32;
  bool quantized;

  Input(const char* op, const char* name, const Tensor& t, int64_t in_features, const OptionalTensor& x_scale,
        const OptionalTensor& x_zero)
      : quantized(bool(x_scale)) {
    const ScalarType type = t.scalar_type();
    const bool float_rows = type == ScalarType::Float || type == ScalarType::BFloat16;
    STD_TORCH_CHECK(t.is_cpu() && (quantized ? type == ScalarType::Char : float_rows), op, ": ", name, " must be ",
                    quantized ? "Char with x_scale" : "Float or BFloat16 without x_scale", " on cpu, got ", type,
                    " on ", device_of(t));
    STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) == in_features, op, ": ", name, " must have packed_weight's ",
                    in_features, " input features, got shape ", list_of(t.sizes()));
    if (quantized) {
      check_tensor(op, "x_scale", *x_scale, ScalarType::Float);
      check_sizes(op, "x_scale", *x_scale, leading_sizes(t));
      scale = Floats(x_scale);
    } else {
      dtype = dtype_of(t);
    }
    STD_TORCH_CHECK(quantized || !x_zero, op, ": x_zero must be None without x_scale");
    if (x_zero) {
      check_tensor(op, "x_zero", *x_zero, ScalarType::Int);
      check_sizes(op, "x_zero", *x_zero, leading_sizes(t));
      zero = torch::stable::contiguous(*x_zero);
    }
    x = Rows(t);
  }

  void set(LinearInt8Params& p) const {
    p.x_stride = x.stride;
    p.rows = x.rows;
    p.x_dtype = dtype;
    if (!quantized) {
      p.x = x.data;
      return;
    }
    p.x_q = static_cast<const int8_t*>(x.data);
    p.x_scale = scale.data;
    p.x_zero = zero.defined() ? static_cast<const int32_t*>(zero.data_ptr()) : nullptr;
  }
};

Tensor empty_output(const char* op, const Tensor& x, int64_t out_features, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": dtype must be Float or BFloat16, got ", dtype);
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(out_features);
  return torch::stable::new_empty(x, sizes, dtype);
}

Tensor run_linear(const char* op, const PackedLinear& linear, const Input& input, const Tensor& x,
                  const OptionalTensor& residual, bool gelu, ScalarType dtype) {
  Tensor y = empty_output(op, x, linear.shape.out_features, dtype);
  LinearInt8Params p = linear.params();
  input.set(p);
  const Rows added(residual);
  if (residual) {
    STD_TORCH_CHECK(!gelu, op, ": residual must be None where gelu is true");
    check_tensor(op, "residual", *residual, dtype);
    check_sizes(op, "residual", *residual, {y.sizes().begin(), y.sizes().end()});
    p.residual = added.data;
    p.residual_stride = added.stride;
  }
  p.y = y.data_ptr();
  p.dtype = dtype_of(y);
  p.gelu = gelu;
  if (p.rows > 0) int8_kernels().linear_int8(p, kExecutor);
  return y;
}

Tensor linear_int8_packed(const Tensor& x_q, const Tensor& x_scale, const Tensor& packed_weight,
                          const Tensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& x_zero,
                          const OptionalTensor& residual, bool gelu, ScalarType dtype) {
  const char* op = "linear_int8_packed";
  check_int8(op);
  const PackedLinear linear(op, packed_weight, weight_scale, bias);
  const Input input(op, "x_q", x_q, linear.shape.in_features, x_scale, x_zero);
  return run_linear(op, linear, input, x_q, residual, gelu, dtype);
}

// x is quantised on the way, as by per_token_quant without symmetry.
Tensor linear_int8_dynamic(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                           const OptionalTensor& bias, bool gelu) {
  const char* op = "linear_int8_dynamic";
  check_int8(op);
  const PackedLinear linear(op, packed_weight, weight_scale, bias);
  const Input input(op, "x", x, linear.shape.in_features, {}, {});
  return run_linear(op, linear, input, x, {}, gelu, x.scalar_type());
}

// fc2(gelu(fc1(x))); x is int8 with x_scale, or quantised on the way.
Tensor mlp_int8(const Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_zero, const Tensor& fc1_weight,
                const Tensor& fc1_scale, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                const Tensor& fc2_scale, const OptionalTensor& fc2_bias, ScalarType dtype) {
  const char* op = "mlp_int8";
  check_int8(op);
  const PackedLinear fc1(op, fc1_weight, fc1_scale, fc1_bias, {"fc1_weight", "fc1_scale", "fc1_bias"});
  const PackedLinear fc2(op, fc2_weight, fc2_scale, fc2_bias, {"fc2_weight", "fc2_scale", "fc2_bias"});
  STD_TORCH_CHECK(fc1.shape.out_features == fc2.shape.in_features, op, ": fc2_weight must have fc1_weight's ",
                  fc1.shape.out_features, " output features as input features, got ", fc2.shape.in_features);
  const Input input(op, "x", x, fc1.shape.in_features, x_scale, x_zero);
  Tensor y = empty_output(op, x, fc2.shape.out_features, dtype);
  MlpInt8Params p = {fc1.params(), fc2.params()};
  input.set(p.fc1);
  p.fc1.gelu = true;
  p.fc2.rows = p.fc1.rows;
  p.fc2.y = y.data_ptr();
  p.fc2.dtype = dtype_of(y);
  if (p.fc1.rows > 0) int8_kernels().mlp_int8(p, kExecutor);
  return y;
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CompositeExplicitAutograd, m) {
  m.impl("multiplies_int8", TORCH_BOX(&internvit::multiplies_int8));
}

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CPU, m) {
  m.impl("pack_weight_int8", TORCH_BOX(&internvit::pack_weight_int8));
  m.impl("linear_int8_packed", TORCH_BOX(&internvit::linear_int8_packed));
  m.impl("linear_int8_dynamic", TORCH_BOX(&internvit::linear_int8_dynamic));
  m.impl("mlp_int8", TORCH_BOX(&internvit::mlp_int8));
}
