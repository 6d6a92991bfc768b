#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
using L = Launches<f16, float>;
const Kernels kFloat16WithFloat32ResidualKernels = {L::norm, L::norm_backward, nullptr, nullptr};
}  // namespace internvit::cuda
