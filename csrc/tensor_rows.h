// What the multi-tensor kernels take: for every parameter a row of tensors that belong together (its value,
// its gradient, its key, ...), all of one shape and laid out in the same order of memory, so that element i
// of one meets element i of the others.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace moco_fast {

struct TensorRow {
    static constexpr int kMaxRoles = 6;
    void* data[kMaxRoles];  // null: this parameter has no such tensor
    DType dtype[kMaxRoles];
    int64_t size;
};
using TensorRows = std::vector<TensorRow>;

// A number the host knows, or, with an address, one that only the GPU knows: read there, so that neither a
// step waits for it nor a captured graph freezes it.
struct Scalar {
    double value;
    const void* address;
    DType dtype;  // f32 or f64, of what is at the address
};

// Where a CUDA kernel runs.
struct CudaStream {
    int device;
    void* stream;
};

}  // namespace moco_fast
