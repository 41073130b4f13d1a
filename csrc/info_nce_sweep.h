// The sweep of InfoNCE over the queue on Hopper: with x^ = x / max(|x|, 1e-12), s_ij = q^_i.n_j * scale,
//
//   q_norm = |q|,  k_norm = |k|,  pos_i = q^_i.k^_i,  and per share of the queue
//   sums_i = sum_j 2^(s_ij - shift_i) n_j,  totals_i = sum_j 2^(s_ij - shift_i),  shifts_i,
//   cosines_i = sum_j q^_i.n_j,  ranks_i = number of q^_i.n_j above pos_i
//
// what kernels/info_nce.py::_prepare and _sweep write, for _finish. 4 N K C FLOP on 16-bit operands in fp32,
// N K exponentials; the queue is read once per 128 queries, 2 K C bytes.
//
// shifts are `fixed_shift`, or with `online` the largest s_ij less `offset`; a block sweeps again with the
// online one if its sums came out infinite with the fixed shift, or the exponentials of a query too small for
// the digits of fp16, below `least` on average.
//
// Shapes: q, k (N, C) of one dtype, queue (K, C) of `operand`, all 16-byte aligned, C a multiple of 8, at
// most 128; norms and pos (N); sums (shares, N, C), all others (shares, N); cosines and ranks null if not
// wanted. Share i is tiles [i * steps, (i + 1) * steps) of kTile rows. Tests: tests/test_info_nce_sweep.py.
#pragma once

#include "tensor_rows.h"

namespace moco_fast {

struct InfoNceSweep {
    static constexpr int kTile = 128;   // rows of the queue at a time
    static constexpr int kFew = 64;     // queries, at most, whose blocks hold 64 of them; others 128
    static constexpr int kWidth = 128;  // of a row, at most

    const void *q, *k;
    DType dtype;  // of both: f32, bf16 or f16
    const void* queue;
    DType operand;  // f16 or bf16
    float *q_norm, *k_norm, *pos;
    float *sums, *totals, *shifts, *cosines;
    int32_t* ranks;
    int64_t n, slots, features;
    int64_t shares, steps;
    float scale, fixed_shift, offset, least;
    bool online;
};

// Queues one launch. Throws std::runtime_error naming the CUDA call that failed. Wants compute capability
// 9.0. Defined in CUDA builds only.
void info_nce_sweep_cuda(const InfoNceSweep& args, const CudaStream& where);

}  // namespace moco_fast
