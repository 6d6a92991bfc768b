#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
const Kernels kFloat32Kernels = Launches<float, float>::table();
}  // namespace internvit::cuda
