// Rows divided by their norms, and what the losses' inner loops want of them (products.h).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "memory.h"

namespace moco_fast {

// Of D problems, in fp32.
struct UnitRows {
    // Throws std::invalid_argument for impossible sizes.
    UnitRows(const void* raw, DType dtype, int64_t d, int64_t r, int64_t c, int threads);

    int64_t problems, count, features;
    Scratch<float> rows;   // (D, R, C)
    Scratch<float> norms;  // (D, R), not clamped
};

// Element c of row i lies in a (panels, C, panel) array at [lane(i, C, panel) + c * panel].
inline int64_t lane(int64_t i, int64_t features, int64_t panel) {
    return i / panel * panel * features + i % panel;
}

// (count, C) -> (panels, C, panel), zero beyond the last row.
void to_panels(const float* rows, int64_t count, int64_t features, int64_t panel, float* packed);

}  // namespace moco_fast
