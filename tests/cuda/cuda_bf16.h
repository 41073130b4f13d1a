// Conversions of CUDA's bfloat16, on the CPU.
#pragma once

#include "dtype.h"

using __nv_bfloat16 = moco_fast::bf16_t;

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    __nv_bfloat16 rounded;
    moco_fast::from_float(x, rounded);
    return rounded;
}
