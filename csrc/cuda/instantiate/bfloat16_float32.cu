#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
using L = Launches<bf16, float>;
const Kernels kBFloat16WithFloat32ResidualKernels = {L::norm, L::norm_backward, nullptr, nullptr};
}  // namespace internvit::cuda
