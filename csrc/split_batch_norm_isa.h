// The passes of split_batch_norm over one tile, compiled once per instruction set. Chosen in
// split_batch_norm.cpp.
//
// A tile is `rows` rows of one part, or `run` positions of one row, and all its channels; value i of channel
// c in row r lies at [r * row_stride + c * channel_stride + i]. With channel_stride = 1 the run is 1.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa_tables.h"

namespace moco_fast {

struct NormTile {
    DType dtype;
    int64_t rows, channels, run, row_stride, channel_stride;
    const void *x, *dy;  // first value of the tile; dy in the backward pass
    void* out;           // y or dx
};

// Per channel of a part. Forward: out = (x - mean) * scale + offset. Backward: out = dy * scale + (x - mean)
// * slope
// + offset.
struct NormFactors {
    const float *mean, *scale, *slope, *offset;
};

struct NormIsa {
    void (*statistics)(const NormTile&, double* mean, double* squares);  // (C) each; squares about the mean
    void (*normalise)(const NormTile&, const NormFactors&);
    void (*sums)(const NormTile&, const float* mean, double* dy,
                 double* dot);  // sums of dy and dy (x - mean)
    void (*gradient)(const NormTile&, const NormFactors&);
};

MOCO_FAST_TABLES(NormIsa, kNorm)

}  // namespace moco_fast
