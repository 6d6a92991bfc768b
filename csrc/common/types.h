// Storage types of tensors, as kernels on CPUs and GPUs know them.
#pragma once

#include <cstdint>

namespace internvit {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace internvit
