// Where a call runs: the device of its tensors, made current, and torch's current stream there.
#pragma once

#ifdef INTERNVIT_CUDA_HOST
#include "cuda_host_stream.h"
#else

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// torch/csrc/inductor/aoti_torch/c/shim.h declares it for translation units that define USE_CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace internvit::cuda {

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  void* get() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_);
    STD_TORCH_CHECK(error == cudaSuccess, "internvit_cuda: ", cudaGetErrorString(error));
    return count;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace internvit::cuda

#endif
