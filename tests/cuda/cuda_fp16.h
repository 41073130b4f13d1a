// Conversions of CUDA's half, on the CPU.
#pragma once

#include "dtype.h"

using __half = moco_fast::f16_t;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return moco_fast::to_float(x); }
inline __half __float2half_rn(float x) {
    __half half;
    moco_fast::from_float(x, half);
    return half;
}
