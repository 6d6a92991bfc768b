#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
using L = Launches<f16, f16>;
const Kernels kFloat16Kernels = {L::norm, L::norm_backward, L::qk_norm_stats_backward, L::gelu};
}  // namespace internvit::cuda
