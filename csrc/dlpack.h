// Reading torch's tensors without libtorch: the part of DLPack's C exchange table that this needs.
//
// torch >= 2.10 publishes the table as torch.Tensor.__dlpack_c_exchange_api__. One call through it tells
// address, shape, strides, dtype and device of a tensor in tens of nanoseconds; as many calls of Python
// methods take a microsecond, which for the 161 parameters of a ResNet-50 is longer than a GPU takes to
// update them.
//
// Layout and meaning: DLPack 1.x, dlpack.h. Only the functions that are called are spelled out.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast::dlpack {

constexpr int kFloat = 2, kBfloat = 4;  // DLDataTypeCode
constexpr int kCpu = 1, kCuda = 2;      // DLDeviceType
constexpr uint32_t kMajor = 1;          // a table of another major version has another layout

struct Device {
    int32_t type, id;
    bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null if contiguous
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void (*unused[3])();  // allocation and owning exchange
    // Fills out, which borrows shape and strides from the tensor; 0, or -1 with a Python exception set.
    int (*tensor_from_py_object)(void* object, Tensor* out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

// As csrc/dtype.h numbers them, or -1.
inline int dtype_code(const DataType& type) {
    if (type.code == kBfloat) return int(DType::bf16);
    if (type.code != kFloat) return -1;
    return int(type.bits == 32 ? DType::f32 : type.bits == 16 ? DType::f16 : DType::f64);
}

inline int64_t numel(const Tensor& tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
    return count;
}

// Whether the tensor fills one stretch of memory when walked with its dimensions in this order, last fastest.
inline bool dense_in_order(const Tensor& tensor, const int* order) {
    int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        const int dim = order ? order[i] : i;
        if (tensor.shape[dim] != 1 && tensor.strides[dim] != stride) return false;
        stride *= tensor.shape[dim];
    }
    return true;
}

inline bool contiguous(const Tensor& tensor) {
    return !tensor.strides || numel(tensor) == 0 || dense_in_order(tensor, nullptr);
}

inline bool channels_last(const Tensor& tensor) {
    constexpr int kOrder[] = {0, 2, 3, 1};
    return tensor.ndim == 4 && tensor.strides && dense_in_order(tensor, kOrder);
}

}  // namespace moco_fast::dlpack
