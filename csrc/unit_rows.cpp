#include "unit_rows.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "parallel.h"

namespace moco_fast {
namespace {

// Below this many values one thread is done before the others wake.
constexpr int64_t kParallelValues = 1 << 16;

template <class T>
void to_unit(const T* row, int64_t features, float* unit, float* norm) {
    *norm = row_norm(row, features);
    const float divisor = clamp_norm(*norm);
    for (int64_t c = 0; c < features; ++c) unit[c] = to_float(row[c]) / divisor;
}

void to_unit(const void* raw, DType dtype, int64_t row, int64_t features, float* unit, float* norm) {
    const int64_t at = row * features;
    switch (dtype) {
        case DType::f32:
            return to_unit(static_cast<const float*>(raw) + at, features, unit, norm);
        case DType::bf16:
            return to_unit(static_cast<const bf16_t*>(raw) + at, features, unit, norm);
        default:
            return to_unit(static_cast<const f16_t*>(raw) + at, features, unit, norm);
    }
}

}  // namespace

UnitRows::UnitRows(const void* raw, DType dtype, int64_t d, int64_t r, int64_t c, int threads)
    : problems(d), count(r), features(c) {
    if (problems < 1 || count < 1 || features < 1 || count > std::numeric_limits<int32_t>::max() ||
        dtype == DType::f64)
        throw std::invalid_argument(
            "problems, rows and features must be at least 1, rows below 2^31, not of f64");
    rows = make_scratch<float>(problems * count * features);
    norms = make_scratch<float>(problems * count);
    if (problems * count * features < kParallelValues) threads = 1;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(static)
    for (int64_t row = 0; row < problems * count; ++row)
        to_unit(raw, dtype, row, features, rows.get() + row * features, norms.get() + row);
}

void to_panels(const float* rows, int64_t count, int64_t features, int64_t panel, float* packed) {
    std::fill_n(packed, ceil_div(count, panel) * panel * features, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        float* at = packed + lane(i, features, panel);
        for (int64_t c = 0; c < features; ++c) at[c * panel] = rows[i * features + c];
    }
}

}  // namespace moco_fast
