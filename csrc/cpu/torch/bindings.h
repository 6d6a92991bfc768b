// What the files of bindings share: the kernels in use, and how they run in torch.
#pragma once

#include "common/tensors.h"
#include "cpu/kernels.h"

namespace internvit {

const Kernels& kernels();

// Of int8 Linears: those, or with AVX-512 but not VNNI (Skylake) the AVX2 unit's.
const Kernels& int8_kernels();
extern const Executor kExecutor;

}  // namespace internvit
