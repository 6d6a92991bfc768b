#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
const Kernels kFloat16Kernels = Launches<f16, f16>::table();
}  // namespace internvit::cuda
