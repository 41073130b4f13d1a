// EMA of parameters, in place: target <- m * target + (1 - m) * source.
//
// One parallel region for the whole model, cut into chunks of equal size whatever the tensors' sizes. 12
// bytes and 3 FLOPs per fp32 parameter, the minimum: two reads, one write. Arithmetic in fp32 (fp64 for fp64
// tensors) as round(m * t) + round((1 - m) * s), without fused multiply-add: in fp32 bitwise what torch gives
// for t * m + s * (1 - m), so a run can move between the two.
//
// Reference: moco_fast/reference.py::ema_update_.  Tests: tests/test_ema_update.py.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace moco_fast {

struct EmaPair {
    void* target;
    const void* source;
    int64_t size;
    DType target_dtype, source_dtype;  // both f64, or any mix of f32, bf16 and f16
};

// Throws std::invalid_argument for a mix with f64 or a negative size, before anything is written.
void ema_update(const std::vector<EmaPair>& pairs, double m, int threads);

}  // namespace moco_fast
