#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
const Kernels kFloat16WithFloat32ResidualKernels = Launches<f16, float>::table();
}  // namespace internvit::cuda
