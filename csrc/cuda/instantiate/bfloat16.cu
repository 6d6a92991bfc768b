#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
const Kernels kBFloat16Kernels = Launches<bf16, bf16>::table();
}  // namespace internvit::cuda
