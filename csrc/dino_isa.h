// The part of dino.h that is compiled once per instruction set, as a table of functions. What a panel is:
// products.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa_tables.h"

namespace moco_fast {

// A run of prototypes, and of their center, against all rows. Logits are above T here: dot products.
struct DinoScan {
    const float *student, *teacher;               // (panels, C, panel), unit
    int64_t rows, panels, features;               // the last panel is filled up with zero rows
    const void *prototypes, *teacher_prototypes;  // (count, C), the first of the run
    DType prototypes_dtype, teacher_prototypes_dtype;
    const float* center;  // (count)
    int64_t count;
    float student_scale, teacher_scale;  // log2(e) / T
    // (panels, panel) each. First sweep: the running maxima, from the lowest number, the sums above them, the
    // first student score of the run, and the sum_p exp((t - max)/T_t) (s - shift). Second sweep: the maxima
    // over all prototypes, and as sums 1 / (T_s total).
    float *student_max, *teacher_max, *student_sum, *teacher_sum, *shift, *cross;
    // Second sweep.
    float* ds;                     // (panels, C, panel) +=, or null
    float* dw;                     // (count, C), or null
    const float* student_columns;  // (ceil(C / panel), panels * panel, panel) of the unit rows, if dw
    // Scratch.
    float *student_scores, *teacher_scores;  // (group, tile, panel), (tile, panel)
    float *prototypes_tile, *teacher_tile;   // (tile, C)
    float* dw_tile;                          // (tile, C rounded up to panel)
};

struct DinoIsa {
    int64_t panel;  // rows per panel
    int64_t tile;   // prototypes per step
    int64_t group;  // panels whose weights are summed into dw at once
    void (*first_sweep)(const DinoScan&);
    void (*second_sweep)(const DinoScan&);
};

MOCO_FAST_TABLES(DinoIsa, kDino)

}  // namespace moco_fast
