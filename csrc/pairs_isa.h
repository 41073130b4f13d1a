// The part of pairs.h that is compiled once per instruction set, as a table of functions. What a panel is:
// products.h.
#pragma once

#include <cstdint>

#include "isa_tables.h"

namespace moco_fast {

// One block of rows x against all columns y.
struct PairsSweep {
    const float* x;  // (panels, C, panel), unit
    int64_t panels;
    const float* y;  // (columns, C), unit
    int64_t columns, features;
    float scale_to_log2;      // log2(e) / T
    const int32_t* left_out;  // (2, panels, panel) columns that a row does not meet, or -1
    // (panels, panel). First pass: the running maximum, which starts as the positive's cosine, and the sum of
    // exp((s - max)/T). Second pass: maximum and share of the row itself, or null.
    float *max, *sum;
    const float *y_max, *y_share;  // (columns), second pass
    // (panels, C, panel) += sum_j w_ij y_j, or null. First pass: w_ij = exp((s_ij - max_i)/T), rescaled where
    // the maximum grew. Second: w_ij = exp((s_ij - max_j)/T) share_j, and the same of i where it has a share.
    float* weighted;
    float* scores;  // scratch, (tile, panel)
};

struct PairsIsa {
    int64_t panel;  // rows of x per panel
    int64_t tile;   // columns per step
    // Cosines of the rows of a panel and of as many others, with the rounding of all cosines of a pass.
    void (*positive)(const float* x, const float* y, int64_t features, float* cosines);
    void (*first_pass)(const PairsSweep&);
    void (*second_pass)(const PairsSweep&);
};

MOCO_FAST_TABLES(PairsIsa, kPairs)

}  // namespace moco_fast
