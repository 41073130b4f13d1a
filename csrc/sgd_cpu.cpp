// See sgd.h. Compiled once per instruction set, with -ffp-contract=off.
#include "optim_isa.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

using namespace sgd;

template <bool Buffer, bool Key, class T>
void update(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double lr, double scale,
            double m) {
    using C = decltype(to_float(T{}));
    T* param = static_cast<T*>(row.data[kParam]);
    const T* grad = static_cast<const T*>(row.data[kGrad]);
    T *buffer = static_cast<T*>(row.data[kBuffer]), *key = static_cast<T*>(row.data[kKey]);
    const Numbers<C> n = numbers<C>(step, lr);
    const C ratio = C(scale), keep = C(m), rest = C(1.0 - m);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        const C p = to_float(param[i]);
        C d = rounded::mul(ratio, decayed(p, to_float(grad[i]), n));
        if constexpr (Buffer) {
            C state = to_float(buffer[i]);
            d = with_momentum(d, state, n);
            from_float(state, buffer[i]);
        }
        from_float(rounded::fma(-n.lr, d, p), param[i]);
        if constexpr (Key)
            from_float(rounded::ema(C(to_float(key[i])), C(to_float(param[i])), keep, rest), key[i]);
    }
}

template <class T>
void update_as(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double lr, double scale,
               double m) {
    const bool buffer = row.data[kBuffer], key = row.data[kKey];
    const auto chosen = buffer ? key ? update<true, true, T> : update<true, false, T>
                        : key  ? update<false, true, T>
                               : update<false, false, T>;
    chosen(row, begin, end, step, lr, scale, m);
}

template <class T>
void squares(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double* sums) {
    using C = decltype(to_float(T{}));
    const T* param = static_cast<const T*>(row.data[kParam]);
    const T* grad = static_cast<const T*>(row.data[kGrad]);
    const Numbers<C> n = numbers<C>(step, 0.0);
    double params = 0, updates = 0;
#pragma omp simd reduction(+ : params, updates)
    for (int64_t i = begin; i < end; ++i) {
        const double p = to_float(param[i]), d = decayed(to_float(param[i]), to_float(grad[i]), n);
        params += p * p;
        updates += d * d;
    }
    sums[0] = params;
    sums[1] = updates;
}

}  // namespace

void sgd_chunk(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double lr, double scale,
               double m) {
    switch (row.dtype[kParam]) {
        case DType::f32:
            return update_as<float>(row, begin, end, step, lr, scale, m);
        case DType::bf16:
            return update_as<bf16_t>(row, begin, end, step, lr, scale, m);
        case DType::f16:
            return update_as<f16_t>(row, begin, end, step, lr, scale, m);
        case DType::f64:
            return update_as<double>(row, begin, end, step, lr, scale, m);
    }
}

void sgd_squares(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double* sums) {
    switch (row.dtype[kParam]) {
        case DType::f32:
            return squares<float>(row, begin, end, step, sums);
        case DType::bf16:
            return squares<bf16_t>(row, begin, end, step, sums);
        case DType::f16:
            return squares<f16_t>(row, begin, end, step, sums);
        case DType::f64:
            return squares<double>(row, begin, end, step, sums);
    }
}

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
