// NT-Xent of two views of a batch on the CPU, and the gradient of its sum.
//
//   s_ij = z^_i . z^_j / T,  i' the other view of i,  p_i = softmax_{j != i}(s_i),  z^ = z / max(|z|, 1e-12)
//   loss_i = logsumexp_{j != i}(s_ij) - s_ii'
//   dz^_i  = (sum_{j != i, i'} (p_ij + p_ji) z^_j - (2 - p_ii' - p_i'i) z^_i') / T
//
// and through the norms as in info_nce.h. Cost of 2N = R rows: 2 R R C FLOPs and R R exponentials; with dz,
// whose weights need the losses of all rows first, 6 and 3; the rest in pairs.h.
//
// Shapes: z (R, C) raw, view 1 of every image, then view 2; loss (R); dz (R, C), of the sum of the losses.
// Reference: moco_fast.reference.nt_xent.  Tests: tests/test_nt_xent.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct NtXent {
    const void* z;  // contiguous
    DType dtype;    // fp64 is not served
    int64_t rows, features;
    double temperature;
    float* loss;
    float* dz;  // or null: not wanted
    int threads;
};

// Throws std::invalid_argument for impossible sizes or temperatures, before anything is written.
void nt_xent(const NtXent& args);

}  // namespace moco_fast
