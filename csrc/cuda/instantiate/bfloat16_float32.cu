#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
const Kernels kBFloat16WithFloat32ResidualKernels = Launches<bf16, float>::table();
}  // namespace internvit::cuda
