// What the files of bindings share: the kernels in use, how they run in torch, and names of dtypes.
#pragma once

#include "common/tensors.h"
#include "cpu/kernels.h"

namespace internvit {

const Kernels& kernels();
extern const Executor kExecutor;
DType dtype_of(const Tensor& t);

}  // namespace internvit
