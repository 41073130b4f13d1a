// See adamw.h. Compiled once per instruction set, with -ffp-contract=off.
#include <math.h>

#include "optim_isa.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

using namespace adamw;

template <bool Key, class T>
void update(const TensorRow& row, int64_t begin, int64_t end, const AdamwStep& step, double lr, double m) {
    using C = decltype(to_float(T{}));
    T* param = static_cast<T*>(row.data[kParam]);
    const T* grad = static_cast<const T*>(row.data[kGrad]);
    T *averages = static_cast<T*>(row.data[kAverage]), *squares = static_cast<T*>(row.data[kSquare]);
    T* key = static_cast<T*>(row.data[kKey]);
    const double t = *static_cast<const float*>(row.data[kStep]);
    const Numbers<C> n = numbers<C>(step, lr, 1.0 - ::pow(step.beta1, t), 1.0 - ::pow(step.beta2, t));
    const C keep = C(m), rest = C(1.0 - m);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        C average = to_float(averages[i]), square = to_float(squares[i]);
        from_float(updated(C(to_float(param[i])), C(to_float(grad[i])), average, square, n), param[i]);
        from_float(average, averages[i]);
        from_float(square, squares[i]);
        if constexpr (Key)
            from_float(rounded::ema(C(to_float(key[i])), C(to_float(param[i])), keep, rest), key[i]);
    }
}

template <class T>
void update_as(const TensorRow& row, int64_t begin, int64_t end, const AdamwStep& step, double lr, double m) {
    (row.data[kKey] ? update<true, T> : update<false, T>)(row, begin, end, step, lr, m);
}

}  // namespace

void adamw_chunk(const TensorRow& row, int64_t begin, int64_t end, const AdamwStep& step, double lr,
                 double m) {
    switch (row.dtype[kParam]) {
        case DType::f32:
            return update_as<float>(row, begin, end, step, lr, m);
        case DType::bf16:
            return update_as<bf16_t>(row, begin, end, step, lr, m);
        case DType::f16:
            return update_as<f16_t>(row, begin, end, step, lr, m);
        case DType::f64:
            return update_as<double>(row, begin, end, step, lr, m);
    }
}

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
