// InfoNCE against a queue of negatives, loss and gradient in one pass, on the CPU.
//
//   q^ = q / max(|q|, 1e-12), k^ likewise
//   s_pos = q^ . k^ / T,  s_j = q^ . n_j / T
//   loss  = logsumexp(s_pos, s_1 .. s_K) - s_pos
//   dq^   = (sum_j p_j n_j - (1 - p_pos) k^) / T,  1 - p_pos = l / (l + e), never a subtraction
//   dq    = (dq^ - q^ (q^ . dq^)) / |q|            (d loss_i / d q_i; no projection below |q| = 1e-12)
//
// with l the negatives' and e the positive's exponentials under one shift. Rows of the queue may have any
// norm: the shift is an online maximum. Never in memory: the N x K logits, their softmax, a transposed or
// packed queue. Cost: 4 N K C FLOPs and N K exponentials; the queue is read once per block of up to 256
// queries from memory and twice from cache. Scratch: 4 MB of partial sums, plus 16 N C bytes. Forward alone
// is half the FLOPs, no scratch. On matrix units for bf16 (info_nce_amx.cpp) a tile of the queue is packed.
//
// The work is cut by the shapes alone and the parts are added in a fixed order, so the result is bitwise the
// same for any number of threads. A NaN or infinity in a row of q, k or the queue makes the losses it enters
// non-finite.
//
// Shapes: q, k (N, C) raw, one dtype; queue (K, C); loss, rank, pos, neg (N); dq (N, C).
// Reference: moco_fast.reference.info_nce.  Tests: tests/test_info_nce.py, tests/test_info_nce_amx.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct InfoNce {
    const void *q, *k;  // (N, C) contiguous, raw
    DType qk_dtype;
    const void* queue;  // (K, C) contiguous rows
    DType queue_dtype;
    int64_t n, negatives, features;
    double temperature;
    float* loss;    // (N)
    float* dq;      // (N, C), or null: forward only
    int64_t* rank;  // (N) negatives strictly above the positive
    float* pos;     // (N) cosine of the positive
    float* neg;     // (N) mean cosine of the negatives
    bool bf16;      // operands of the products may be rounded to bf16: they are where has_amx()
    int threads;
};

// Throws std::invalid_argument for impossible sizes and std::bad_alloc.
void info_nce(const InfoNce& args);

}  // namespace moco_fast
