#include "cuda/instantiate/launches.cuh"

namespace internvit::cuda {
using L = Launches<bf16, bf16>;
const Kernels kBFloat16Kernels = {L::norm, L::norm_backward, L::qk_norm_stats_backward, L::gelu};
}  // namespace internvit::cuda
