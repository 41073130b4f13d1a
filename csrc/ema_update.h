// EMA of parameters, in place: target <- m * target + (1 - m) * source.
//
// One parallel region, or one launch, for the whole model, cut into chunks of equal size whatever the
// tensors' sizes. 12 bytes and 3 FLOPs per fp32 parameter, the minimum: two reads, one write. Arithmetic in
// fp32 (fp64 for fp64 tensors) as round(m * t) + round((1 - m) * s), without fused multiply-add: in fp32
// bitwise what torch gives for t * m + s * (1 - m), so a run can move between the two.
//
// With a master, an fp32 copy of a target of lower precision: master <- m * master + (1 - m) * source,
// target <- round(master). A bf16 target by itself stops moving once (1 - m) * (source - target) is below
// half a unit in its last place, at m = 0.999 at any difference below twice its value.
//
// Reference: moco_fast.reference.ema_update_.  Tests: tests/test_ema_update.py.
#pragma once

#include "tensor_rows.h"

namespace moco_fast {

namespace ema {
enum Role { kTarget, kSource, kMaster, kRoles };  // kMaster may be null, else it is f32
}

// Both throw std::invalid_argument for a mix with f64 or a negative size, before anything is written.
void ema_update(const TensorRows& rows, double m, int threads);

// Returns once the launches are queued: one per ema_update_cuda.cu's table of tensors. Throws
// std::runtime_error naming the CUDA call that failed. Defined in CUDA builds only.
void ema_update_cuda(const TensorRows& rows, const Scalar& m, const CudaStream& where);

namespace ema {
void check(const TensorRows& rows);
}

}  // namespace moco_fast
