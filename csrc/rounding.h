// Arithmetic whose roundings are spelled out: the same bits from a CPU, from a GPU and from any compiler.
// Host code that includes this is compiled with -ffp-contract=off; nvcc never fuses or splits these
// intrinsics.
#pragma once

#if defined(__CUDACC__)
#define MOCO_FAST_BOTH static __host__ __device__ __forceinline__
#else
#define MOCO_FAST_BOTH static inline __attribute__((always_inline))
#endif

namespace moco_fast::rounded {

#if defined(__CUDA_ARCH__)
MOCO_FAST_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
MOCO_FAST_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
MOCO_FAST_BOTH float div(float a, float b) { return __fdiv_rn(a, b); }
MOCO_FAST_BOTH float root(float a) { return __fsqrt_rn(a); }
MOCO_FAST_BOTH float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MOCO_FAST_BOTH double mul(double a, double b) { return __dmul_rn(a, b); }
MOCO_FAST_BOTH double add(double a, double b) { return __dadd_rn(a, b); }
MOCO_FAST_BOTH double div(double a, double b) { return __ddiv_rn(a, b); }
MOCO_FAST_BOTH double root(double a) { return __dsqrt_rn(a); }
MOCO_FAST_BOTH double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
MOCO_FAST_BOTH float mul(float a, float b) { return a * b; }
MOCO_FAST_BOTH float add(float a, float b) { return a + b; }
MOCO_FAST_BOTH float div(float a, float b) { return a / b; }
MOCO_FAST_BOTH float root(float a) { return __builtin_sqrtf(a); }
MOCO_FAST_BOTH float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MOCO_FAST_BOTH double mul(double a, double b) { return a * b; }
MOCO_FAST_BOTH double add(double a, double b) { return a + b; }
MOCO_FAST_BOTH double div(double a, double b) { return a / b; }
MOCO_FAST_BOTH double root(double a) { return __builtin_sqrt(a); }
MOCO_FAST_BOTH double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// m * target + (1 - m) * source, as ema_update.h promises it.
template <class T>
MOCO_FAST_BOTH T ema(T target, T source, T m, T rest) {
    return add(mul(target, m), mul(source, rest));
}

}  // namespace moco_fast::rounded
