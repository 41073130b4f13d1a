// Cross-entropy of queries against the keys of a batch on the CPU, and its gradients, for D problems.
//
//   s_ij = q^_i . k^_j / T,  y_i = first + i,  p_i = softmax(s_i),  x^ = x / max(|x|, 1e-12)
//   loss_i = logsumexp_j(s_ij) - s_iy
//   dq^_i  = (sum_{j != y} p_ij k^_j - (1 - p_iy) k^_y) / T
//   dk^_j  = (sum_{i: y_i != j} p_ij q^_i - sum_{i: y_i = j} (1 - p_ij) q^_i) / T
//
// and through the norms as in info_nce.h. Cost: 2 D N M C FLOPs, 4 with dq, 4 more with dk, which takes a
// second pass; the rest in pairs.h.
//
// Shapes: q (D, N, C), k (D, M, C) raw, one dtype; loss (D, N); dq as q, dk as k, of the sum of the losses.
// Reference: moco_fast.reference.contrast.  Tests: tests/test_contrast.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct Contrast {
    const void *q, *k;  // contiguous
    DType dtype;        // fp64 is not served
    int64_t problems, queries, keys, features;
    int64_t first;  // in [0, M - N]
    double temperature;
    float* loss;
    float *dq, *dk;  // or null: not wanted
    int threads;
};

// Throws std::invalid_argument for impossible sizes or temperatures, before anything is written.
void contrast(const Contrast& args);

}  // namespace moco_fast
