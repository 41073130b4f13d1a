// DINO's cross-entropy between a centred, sharpened teacher and a student over P prototypes, and its
// gradients, on the CPU. With p^s_i = softmax(s_i) and p^t_i = softmax(t_i):
//
//   s_ip   = s^_i . w_p / T_s,  t_ip = (t^_i . v_p - center_p) / T_t
//   loss_i = logsumexp_p(s_ip) - sum_p p^t_ip s_ip
//   ds^_i  = sum_p (p^s_ip - p^t_ip) w_p / T_s
//   ds_i   = (ds^_i - s^_i (s^_i . ds^_i)) / |s_i|
//   dw_p   = sum_i (p^s_ip - p^t_ip) s^_i / T_s
//
// A first sweep over the prototypes finds maxima, sums and the loss, a second one computes the logits again
// and from them the gradients: the N x P logits never exist. Cost: 4 N P C FLOPs and 2 N P exponentials; with
// gradients 8 N P C more at most and as many exponentials again. Both sets of prototypes are read once per
// sweep.
//
// Scratch, of N rounded up to whole panels of at most 32: packed rows, 16 N C bytes, 20 with dw; 24 N bytes
// for each run of prototypes, and with ds 4 N C more. There are 8 runs of few prototypes, 32 from P = 64 C
// on. Per thread four tiles of 96 prototypes.
//
// The work is cut by the shapes alone and the parts are added in a fixed order: bitwise the same for any
// number of threads.
//
// Shapes: student, teacher (N, C) raw, one dtype; prototypes, teacher_prototypes (P, C); center (P);
// loss (N); ds (N, C), of each row's loss; dw (P, C), of the sum of the losses.
//
// Reference: moco_fast.reference.dino.  Tests: tests/test_dino_op.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct Dino {
    const void *student, *teacher;  // contiguous
    DType rows_dtype;               // no dtype is f64
    const void *prototypes, *teacher_prototypes;
    DType prototypes_dtype, teacher_prototypes_dtype;
    const float* center;
    int64_t rows, count, features;  // N, P, C
    double student_temperature, teacher_temperature;
    float* loss;
    float *ds, *dw;  // or null: not wanted
    int threads;
};

// Throws std::invalid_argument for impossible sizes or temperatures, before anything is written.
void dino(const Dino& args);

}  // namespace moco_fast
