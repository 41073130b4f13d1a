// fp32 vectors of 4, 8 or 16 lanes through the vector extensions of GCC and Clang: one source for every ISA.
// Included by translation units that are compiled once per ISA, inside a namespace of that ISA's name.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MOCO_FAST_INLINE static inline __attribute__((always_inline))

namespace moco_fast {
namespace MOCO_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisterRows = 12;  // 12 x 2 accumulators of 32 registers; broadcasts are memory operands
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisterRows = 6;  // 6 x 2 accumulators, 2 loads, 1 broadcast of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kRegisterRows = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef float VecU __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

MOCO_FAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
MOCO_FAST_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
MOCO_FAST_INLINE Vec splat(float x) { return x - Vec{}; }
MOCO_FAST_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b when either is NaN

// 2^(x * scale) for x * scale <= 0 within 1 ulp of what the rounded scale gives; exactly 0 below 2^-126,
// where the result would be denormal; NaN stays NaN.
MOCO_FAST_INLINE Vec exp2_scaled(Vec x, float scale) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, ready to become an exponent.
    constexpr float kRound = 12582912.0f;
    const Vec shifted = x * scale + kRound;
    const Vec n = shifted - kRound;
    const Vec r = x * scale - n;  // one fused operation: the product is never rounded
    Vec p = r * 0x1.444004p-13f + 0x1.5f0896p-10f;
    p = p * r + 0x1.3b2a1cp-7f;
    p = p * r + 0x1.c6af6cp-5f;
    p = p * r + 0x1.ebfbe0p-3f;
    p = p * r + 0x1.62e430p-1f;
    p = p * r + 1.0f;
    const Bits power = (Bits(shifted) << 23) + 0x3f800000u;
    return Vec(Int(p * Vec(power)) & ~(n < -126.0f));
}

// 16-bit values as vectors. The scalar conversions of dtype.h, lane by lane.
typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));
typedef uint16_t ShortU __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

MOCO_FAST_INLINE Vec load(const bf16_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // which GCC would widen half by half
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Vec(Bits(_mm256_cvtepu16_epi32(bits)) << 16);
#else
    const Short bits = *reinterpret_cast<const ShortU*>(p);
    return Vec(__builtin_convertvector(bits, Bits) << 16);
#endif
}

MOCO_FAST_INLINE void store(bf16_t* p, Vec v) {
    const Bits u = Bits(v);
    const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Bits nan = Bits(v != v);
    const Bits chosen = (rounded & ~nan) | (0x7fc0u & nan);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed = _mm256_packus_epi32(__m256i(chosen), __m256i(chosen));  // in each half
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
#else
    *reinterpret_cast<ShortU*>(p) = __builtin_convertvector(chosen, Short);
#endif
}

MOCO_FAST_INLINE Vec load(const f16_t* p) {
#if defined(__AVX512F__)
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

MOCO_FAST_INLINE void store(f16_t* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
#endif
}

// Widen `size` values to fp32.
MOCO_FAST_INLINE void widen(const bf16_t* from, float* to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

MOCO_FAST_INLINE void widen(const f16_t* from, float* to, int64_t size) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= size; i += 8)
        _mm256_storeu_ps(to + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < size; ++i) to[i] = to_float(from[i]);
}

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
