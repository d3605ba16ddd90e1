// What every CUDA operator needs of a tensor's device.
#pragma once

#include <tuple>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <aigc_fast/torch.h>

// Weak: a torch without CUDA lacks it, and the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace aigc_fast {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes a tensor's device current for its own lifetime, and launches on torch's current stream.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      throw std::runtime_error("this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int processors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  template <class... Args>
  void launch(void (*kernel)(Args...), int64_t blocks, int threads, int shared,
              const Args&... args) const {
    if (shared > 48 * 1024)  // more than that has to be asked for
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(args...);
    check(cudaGetLastError());
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace aigc_fast
