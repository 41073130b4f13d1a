// One chunk [begin, end) of a parameter on the CPU: compiled once per instruction set, because the fused
// multiply-adds that torch rounds with are a library call without one. Chosen in optim.cpp.
#pragma once

#include "adamw.h"
#include "sgd.h"

#define MOCO_FAST_OPTIM_KERNELS(isa)                                                                       \
    namespace moco_fast::isa {                                                                             \
    void sgd_chunk(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double lr,       \
                   double scale, double m);                                                                \
    /* sums[0], sums[1]: squares of param and of d */                                                      \
    void sgd_squares(const TensorRow& row, int64_t begin, int64_t end, const SgdStep& step, double* sums); \
    void adamw_chunk(const TensorRow& row, int64_t begin, int64_t end, const AdamwStep& step, double lr,   \
                     double m);                                                                            \
    }

MOCO_FAST_OPTIM_KERNELS(baseline)
#if defined(MOCO_FAST_X86_64)
MOCO_FAST_OPTIM_KERNELS(avx2)
MOCO_FAST_OPTIM_KERNELS(avx512)
#endif
