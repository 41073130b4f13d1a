// Element types as Python names them by number, and one value or one row at a time in fp32.
// Included by translation units of every instruction set: everything here is static, never a weak symbol that
// the linker could take from an AVX-512 object.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace moco_fast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

static inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct bf16_t {
    uint16_t bits;
};
struct f16_t {
    uint16_t bits;
};

static inline uint32_t to_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

static inline float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }  // fp64 is computed in fp64
static inline float to_float(bf16_t x) { return from_bits(uint32_t(x.bits) << 16); }

// Branch-free: the multiplication by 2^112 moves the exponent bias and normalises denormals at once.
static inline float to_float(f16_t x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN keep their exponent
    return from_bits(to_bits(from_bits(magnitude) * 0x1p112f) | special | uint32_t(x.bits & 0x8000) << 16);
}

static inline void from_float(float x, float& out) { out = x; }
static inline void from_float(double x, double& out) { out = x; }

static inline void from_float(float x, bf16_t& out) {
    const uint32_t u = to_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

static inline void from_float(float x, f16_t& out) {
    const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Below 2^-14 the float adder rounds for us: adding 0.5 leaves the denormal's bits in the low mantissa.
    const uint32_t denormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
    out.bits = uint16_t(sign | half);
}

// term(0) + .. + term(size - 1) in fp64. Four chains hide the latency of the addition; their order is fixed.
template <class Term>
static inline double sum_of(int64_t size, const Term& term) {
    double sum[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
        for (int u = 0; u < 4; ++u) sum[u] += term(i + u);
    for (; i < size; ++i) sum[0] += term(i);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Norm of a row, summed in fp64: squares of large fp32 values must not overflow.
template <class T>
static inline float row_norm(const T* row, int64_t size) {
    return float(std::sqrt(sum_of(size, [row](int64_t i) {
        const double x = to_float(row[i]);
        return x * x;
    })));
}

// What torch.nn.functional.normalize divides by: max(|row|, 1e-12); a NaN norm stays NaN.
constexpr float kNormFloor = 1e-12f;
static inline float clamp_norm(float norm) { return norm < kNormFloor ? kNormFloor : norm; }

}  // namespace moco_fast
