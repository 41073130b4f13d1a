// Batch normalisation of S parts of a batch on the CPU. Over the M values that channel c has in part s:
//   forward:   mean = sum(x) / M,  var = sum((x - mean)^2) / M,  y = (x - mean) / sqrt(var + eps) * weight +
//   bias backward:  db = sum_s sum(dy),  dw = sum_s sum(dy x^)  with  x^ = (x - mean) / sqrt(var + eps)
//              dx = weight / sqrt(var + eps) * (dy - sum(dy) / M - x^ sum(dy x^) / M)
//
// Reads x twice and writes y; reads x and dy twice and writes dx: 3 and 5 values of memory traffic, about 6
// and 9 FLOP per value, and less than that from memory where the second pass finds the first one's data in
// the cache.
//
// Sums are taken in fp32 over tiles of at most 1024 values per channel, above a value of the tile that is no
// outlier: neither a large mean nor an outlier costs digits. Tiles are joined in fp64, in a fixed order,
// whatever thread made them: the same bits for any number of threads.
//
// Shapes: x, y, dy, dx (S, R, C, L) contiguous, which is (N, C, L values) for contiguous tensors with R =
// N/S, and with R = L N/S and L = 1 for channels-last ones; M = R L. weight, bias, dw, db (C); mean, var (S,
// C). Reference: moco_fast.reference.split_batch_norm.  Tests: tests/test_split_batch_norm.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct PartsShape {
    DType dtype;  // of x, y, dy and dx; fp64 is not served
    int64_t parts, rows, channels, run;
};

struct SplitBatchNorm {
    PartsShape shape;
    const void* x;
    const float *weight, *bias;  // null: ones, zeros
    double eps;
    void* y;
    float *mean, *var;
    int threads;
};

struct SplitBatchNormBackward {
    PartsShape shape;
    const void *dy, *x;
    const float* weight;  // null: ones
    const float *mean, *var;
    double eps;
    void* dx;
    float *dw, *db;
    int threads;
};

// Both throw std::invalid_argument for impossible sizes, before anything is written.
void split_batch_norm(const SplitBatchNorm& args);
void split_batch_norm_backward(const SplitBatchNormBackward& args);

}  // namespace moco_fast
