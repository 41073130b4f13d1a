// Element types on the GPU. Included by *_cuda.cu only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace moco_fast::cuda {

// dtype.h's conversions, by the GPU's own instructions.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16_t x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, bf16_t& out) {
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, f16_t& out) {
    out.bits = __half_as_ushort(__float2half_rn(x));
}

// visit(value) with a value of the type that dtype names.
template <class Visit>
__device__ __forceinline__ void with_type(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::f32:
            return visit(float{});
        case DType::bf16:
            return visit(bf16_t{});
        case DType::f16:
            return visit(f16_t{});
        case DType::f64:
            return visit(double{});
    }
}

}  // namespace moco_fast::cuda
