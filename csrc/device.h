// The CUDA devices of this machine, for `moco-fast doctor`.
#pragma once

#include <string>
#include <vector>

namespace moco_fast {

struct CudaDevice {
    std::string name;
    int major, minor;  // compute capability
};

// Empty without a driver or a device. Defined in CUDA builds only.
std::vector<CudaDevice> cuda_devices();

}  // namespace moco_fast
