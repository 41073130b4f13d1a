// One launch over hundreds of tensors. The table of their addresses and sizes is the kernel's parameter, so
// it needs no memory on the device and no copy, and a captured graph holds its own. The tensors are cut into
// chunks, one per block; a block finds its tensor by binary search over the numbers of the first chunks.
//
// Included by *_cuda.cu only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "dtype_cuda.h"
#include "launch_cuda.h"
#include "rounding.h"
#include "tensor_rows.h"

namespace moco_fast::cuda {

// What CUDA 12.1 and newer pass to a kernel on sm_70 and newer; 4 KB before.
constexpr std::size_t kParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr std::size_t kOtherParameters = 256;  // left for what a kernel takes besides the table

constexpr int kThreads = 256;
// Elements per block, 32 per thread. A multiple of every vector, so that chunks keep the tensor's alignment.
constexpr int64_t kChunk = 8192;

inline int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <int Roles>
struct Table {
    static constexpr int kCapacity = (kParameterBytes - kOtherParameters) / (Roles * 9 + 12);
    void* data[Roles][kCapacity];
    int64_t size[kCapacity];          // at least 1
    int32_t first[kCapacity];         // chunk at which each tensor begins; 2^31 chunks exceed any memory
    uint8_t dtype[Roles][kCapacity];  // DType
    int32_t tensors;
};

// --- host ---

template <class T>
struct Identity {
    using Type = T;
};

// The return code is the launch's own, unlike cudaGetLastError's, which may be of somebody else's kernel.
template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), int blocks, const CudaStream& where,
            const typename Identity<Parameters>::Type&... arguments) {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0,
                           static_cast<cudaStream_t>(where.stream)),
          op, "cudaLaunchKernel");
}

// launch(table, chunks) for as many non-empty tensors at a time as a table holds.
template <int Roles, class Launch>
void for_each_table(const TensorRows& rows, Launch launch) {
    Table<Roles> table;
    int32_t chunks = 0;
    table.tensors = 0;
    for (std::size_t row = 0; row < rows.size(); ++row) {
        if (rows[row].size > 0) {
            const int at = table.tensors++;
            for (int role = 0; role < Roles; ++role) {
                table.data[role][at] = rows[row].data[role];
                table.dtype[role][at] = uint8_t(rows[row].dtype[role]);
            }
            table.size[at] = rows[row].size;
            table.first[at] = chunks;
            chunks += int32_t(chunks_of(rows[row].size));
        }
        if (table.tensors == Table<Roles>::kCapacity || (row + 1 == rows.size() && table.tensors > 0)) {
            launch(table, chunks);
            chunks = table.tensors = 0;
        }
    }
}

// --- device ---

// What one block works on: elements [begin, begin + count) of a tensor of the table.
struct Share {
    int tensor;
    int64_t begin;
    int count;
};

template <int Roles>
__device__ __forceinline__ Share share_of_block(const Table<Roles>& table) {
    const int chunk = int(blockIdx.x);
    int low = 0, high = table.tensors;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first[middle] <= chunk)
            low = middle;
        else
            high = middle;
    }
    const int64_t begin = int64_t(chunk - table.first[low]) * kChunk;
    const int64_t left = table.size[low] - begin;
    return {low, begin, int(left < kChunk ? left : kChunk)};
}

// Whether the first `Roles` addresses of a tensor all take 16-byte accesses. torch allocates at multiples of
// 512 bytes; views into flat buffers may begin anywhere, and then go element by element, still coalesced.
template <int Roles, class AnyTable>
__device__ __forceinline__ bool aligned(const AnyTable& table, int tensor) {
    uintptr_t bits = 0;
#pragma unroll
    for (int role = 0; role < Roles; ++role) bits |= reinterpret_cast<uintptr_t>(table.data[role][tensor]);
    return bits % 16 == 0;
}

template <class T, class AnyTable>
__device__ __forceinline__ T* at(const AnyTable& table, int role, const Share& share) {
    T* data = static_cast<T*>(table.data[role][share.tensor]);
    return data ? data + share.begin : nullptr;
}

// V values at once, 16 bytes per access; or one. Once: nobody reads them again before they are overwritten,
// so they are the first to leave the cache.
template <bool Once = false, class T, int V>
__device__ __forceinline__ void load(const T* from, T (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = *from;
    } else {
        static_assert(V * sizeof(T) % 16 == 0, "a vector is made of 16-byte accesses");
        const uint4* vectors = reinterpret_cast<const uint4*>(from);
        uint4 bits[V * sizeof(T) / 16];
#pragma unroll
        for (int i = 0; i < int(V * sizeof(T) / 16); ++i) bits[i] = Once ? __ldcs(vectors + i) : vectors[i];
        memcpy(to, bits, sizeof to);
    }
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const T (&from)[V]) {
    if constexpr (V == 1) {
        *to = from[0];
    } else {
        static_assert(V * sizeof(T) % 16 == 0, "a vector is made of 16-byte accesses");
        uint4 bits[V * sizeof(T) / 16];
        memcpy(bits, from, sizeof from);
#pragma unroll
        for (int i = 0; i < int(V * sizeof(T) / 16); ++i) reinterpret_cast<uint4*>(to)[i] = bits[i];
    }
}

template <class T>
using Compute = decltype(widen(T{}));  // double for double, else float

// A scalar and one minus it, rounded as torch rounds `(1 - m)`: once in its own precision, then to C.
template <class C>
struct Complement {
    C value, rest;
};
template <class C>
__device__ __forceinline__ Complement<C> complement(const Scalar& m) {
    if (m.address && m.dtype == DType::f32) {
        const float value = *static_cast<const float*>(m.address);
        return {C(value), C(__fsub_rn(1.0f, value))};
    }
    const double value = m.address ? *static_cast<const double*>(m.address) : m.value;
    return {C(value), C(__dsub_rn(1.0, value))};
}

__device__ __forceinline__ double value_of(const Scalar& x) {
    if (!x.address) return x.value;
    return x.dtype == DType::f32 ? double(*static_cast<const float*>(x.address))
                                 : *static_cast<const double*>(x.address);
}

}  // namespace moco_fast::cuda
