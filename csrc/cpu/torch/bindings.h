// What the files of bindings share: the kernels in use, and how they run in torch.
#pragma once

#include "common/tensors.h"
#include "cpu/kernels.h"

namespace internvit {

const Kernels& kernels();
extern const Executor kExecutor;

}  // namespace internvit
