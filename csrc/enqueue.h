// Ring buffer of negatives: rows (ptr + i) mod K <- keys_i / max(|keys_i|, 1e-12), then ptr <- (ptr + N) mod
// K.
//
// The norm is summed in fp64 and the division is in fp32, as info_nce normalises: an enqueued key equals the
// unit key the loss saw, bit for bit. N rows are read and written once; the batch wraps anywhere, for any N
// <= K.
//
// Shapes: queue (K, C) contiguous rows; keys (N, C) contiguous; ptr one int64; order (N) int64, the key to
// write i-th, or null for keys that are in order.
// Reference: moco_fast.reference.enqueue_.  Tests: tests/test_enqueue.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct Enqueue {
    void* queue;  // (K, C)
    DType queue_dtype;
    int64_t slots, features;
    int64_t* ptr;
    const void* keys;  // (N, C)
    DType keys_dtype;
    int64_t n;
    const int64_t* order;  // (N), or null
    int threads;
};

// Throws std::invalid_argument, before anything is written, for ptr outside [0, K), N > K or impossible
// sizes.
void enqueue(const Enqueue& args);

}  // namespace moco_fast
