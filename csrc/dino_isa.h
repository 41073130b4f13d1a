// The part of dino.h that is compiled once per instruction set, as a table of functions. What a panel is:
// products.h.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

// A run of prototypes, and of their center, against all rows. Logits are above T here: dot products.
struct DinoScan {
    const float *student, *teacher;  // (panels, C, panel), unit
    int64_t panels, features;
    const void *prototypes, *teacher_prototypes;  // (count, C), the first of the run
    DType prototypes_dtype, teacher_prototypes_dtype;
    const float* center;                     // (count)
    int64_t count;                           // prototypes of the run
    float student_scale, teacher_scale;      // log2(e) / T
    float *student_max, *teacher_max;        // (panels, panel); first sweep: running, from -inf
    float *student_sum, *teacher_sum;        // first sweep: running; second: 1 / (T_s total)
    float* cross;                            // first sweep: running sum_p exp((t - max)/T_t) s
    float* ds;                               // second: (panels, C, panel) +=, or null
    float* dw;                               // second: (count, C), or null
    const float* student_columns;            // second: (ceil(C / panel), rows, panel) of unit rows, if dw
    float *student_scores, *teacher_scores;  // scratch, (group, tile, panel) and (tile, panel)
    float *prototypes_tile, *teacher_tile,
        *dw_tile;  // scratch, (tile, C), (tile, C), (tile, C padded to panel)
};

struct DinoIsa {
    int64_t panel;  // rows per panel
    int64_t tile;   // prototypes per step
    int64_t group;  // panels whose weights are summed into dw at once
    void (*first_sweep)(const DinoScan&);
    void (*second_sweep)(const DinoScan&);
};

namespace baseline {
extern const DinoIsa kDino;
}
namespace avx2 {
extern const DinoIsa kDino;
}
namespace avx512 {
extern const DinoIsa kDino;
}

}  // namespace moco_fast
