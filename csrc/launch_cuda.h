// What every launch needs. Included by *_cuda.cu only.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace moco_fast::cuda {

// Every CUDA call is checked and throws std::runtime_error naming the op.
inline void check(cudaError_t code, const char* op, const char* call) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(code) + " (" +
                             cudaGetErrorName(code) + ")");
}

// Makes a device current, and the one that was current again. Python has done so already, by torch: CUDA's
// own call opens a context on the device that it goes back to.
class OnDevice {
  public:
    OnDevice(int device, const char* op) : device_(device) {
        check(cudaGetDevice(&before_), op, "cudaGetDevice");
        if (before_ != device_) check(cudaSetDevice(device_), op, "cudaSetDevice");
    }
    ~OnDevice() {
        if (before_ != device_)
            static_cast<void>(cudaSetDevice(before_));  // it was current: cannot fail anew
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0, device_;
};

}  // namespace moco_fast::cuda
