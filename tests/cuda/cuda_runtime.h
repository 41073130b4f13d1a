// CUDA C++ and as much of its runtime as the kernels use, on the CPU: see machine.h.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other; those of a cluster use dynamic memory only

#define threadIdx (::emulated::self().index)
#define blockIdx (::emulated::self().block->index)
inline emulated::Index& gridDim = emulated::machine().grid;

// --- functions of the device ---

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};

template <class To, class From>
To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dsub_rn(double a, double b) { return a - b; }

template <class T>
T __ldcs(const T* at) {
    return *at;
}

inline void __syncthreads() { emulated::meet_block(); }
inline void __syncwarp() { emulated::meet_warp(); }

inline int __syncthreads_or(int vote) {
    emulated::Block& block = *emulated::self().block;
    block.votes += vote != 0;
    emulated::meet_block();
    const int any = block.votes > 0;
    emulated::meet_block();
    if (emulated::self().number() == 0) block.votes = 0;
    emulated::meet_block();
    return any;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
    emulated::require(lanes == 0xffffffffu, "a shuffle of some lanes");
    emulated::Warp& warp = emulated::own_warp();
    const int lane = emulated::self().number() % emulated::kWarp;
    static_assert(sizeof(T) <= sizeof warp.slot[0]);
    std::memcpy(&warp.slot[lane], &value, sizeof value);
    emulated::meet_warp();
    std::memcpy(&value, &warp.slot[lane ^ distance], sizeof value);
    emulated::meet_warp();
    return value;
}

// --- the runtime ---

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = struct emulated_stream*;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

// As the runtime does, arguments are converted to what the kernel takes, and every thread has its own copy.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
    const dim3 cluster = config->numAttrs ? config->attrs[0].val.clusterDim : dim3();
    const std::tuple<std::remove_cv_t<Parameters>...> kept{std::forward<Arguments>(arguments)...};
    emulated::run({config->gridDim.x, config->gridDim.y, config->gridDim.z}, int(config->blockDim.x),
                  {cluster.x, cluster.y, cluster.z}, config->dynamicSmemBytes,
                  [&] { std::apply(kernel, kept); });
    return cudaSuccess;
}

template <class... Parameters, std::size_t... I>
cudaError_t emulated_launch(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config, void** arguments,
                            std::index_sequence<I...>) {
    return cudaLaunchKernelEx(&config, kernel, *static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared, cudaStream_t) {
    cudaLaunchConfig_t config;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    return emulated_launch(kernel, config, arguments, std::index_sequence_for<Parameters...>{});
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
