#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
using L = Launches<float, float>;
const Kernels kFloat32Kernels = {L::norm, L::norm_backward, L::qk_norm_stats_backward, L::gelu};
}  // namespace internvit::cuda
