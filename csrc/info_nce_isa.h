// The part of info_nce that is compiled once per instruction set, as a table of functions. What a panel is:
// products.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa_tables.h"

namespace moco_fast {

// Online softmax of every query over the rows seen so far, panel after panel. `max` starts as the cosine of
// the positive, so it is finite whenever the inputs are; the sums are over the negatives only.
struct SoftmaxState {
    float* max;         // (N) largest cosine, not over T
    float* sum;         // (N) sum of exp((s - max) / T)
    float* cosine_sum;  // (N)
    int32_t* rank;      // (N) negatives strictly above the positive
};

// One block of queries against a run of queue rows.
struct InfoNceScan {
    const float* queries;   // (panels, C, panel), unit
    const float* positive;  // (panels, panel) cosine of the positive
    int64_t panels;
    const void* rows;  // (count, C), the first row of the run
    DType rows_dtype;
    int64_t count;
    int64_t features;
    float scale_to_log2;  // log2(e) / T: exp((s - max) / T) = 2^((s - max) * scale_to_log2)
    SoftmaxState state;   // (panels, panel), initialised by the caller
    float* weighted;      // (panels, C, panel) += sum_j exp((s_j - max)/T) row_j, or null
    float* scratch;       // as many floats as the scanner asks for, aligned to 64 bytes
};

struct InfoNceScanner {
    int64_t tile;  // queue rows per softmax step
    int64_t (*scratch)(int64_t features, int64_t panels, DType rows_dtype);
    void (*scan)(const InfoNceScan&);
};

struct InfoNceIsa {
    int64_t panel;  // queries per panel
    // Cosine of the positive with the rounding of the negatives' dot products in fp32: a queue row equal to
    // the key ties.
    void (*positive)(const float* queries, const float* keys, int64_t features, float* cosine);
    // into = into * into_scale + from * from_scale for one panel of weighted sums.
    void (*merge)(float* into, const float* from, const float* into_scale, const float* from_scale,
                  int64_t features);
    InfoNceScanner fp32;
};

MOCO_FAST_TABLES(InfoNceIsa, kInfoNce)

// Beside avx512, whose panels it takes; to be used where has_amx().
namespace amx {
extern const InfoNceScanner kInfoNceBf16;
}

}  // namespace moco_fast
