#include <cuda_runtime.h>

#include "device.h"

namespace moco_fast {

std::vector<CudaDevice> cuda_devices() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<CudaDevice> devices;
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
        devices.push_back({properties.name, properties.major, properties.minor});
    }
    return devices;
}

}  // namespace moco_fast
