#include <algorithm>
#include <stdexcept>
#include <string>

#include "enqueue.h"
#include "parallel.h"

namespace moco_fast {
namespace {

template <class Slot, class Key>
void write_row(Slot* slot, const Key* key, int64_t features) {
    const float divisor = clamp_norm(row_norm(key, features));
    for (int64_t c = 0; c < features; ++c) from_float(to_float(key[c]) / divisor, slot[c]);
}

template <class Slot, class Key>
void write_rows(const Enqueue& a) {
    // Below this many values one thread is done before the others wake.
    constexpr int64_t kParallelValues = 1 << 20;
#pragma omp parallel for num_threads(std::max(1, a.threads)) \
    schedule(static) if (a.n * a.features > kParallelValues)
    for (int64_t i = 0; i < a.n; ++i) {
        const int64_t slot = (*a.ptr + i) % a.slots;
        const int64_t key = a.order ? a.order[i] : i;
        write_row(static_cast<Slot*>(a.queue) + slot * a.features,
                  static_cast<const Key*>(a.keys) + key * a.features, a.features);
    }
}

template <class Slot>
void write_keys(const Enqueue& a) {
    switch (a.keys_dtype) {
        case DType::f32:
            return write_rows<Slot, float>(a);
        case DType::bf16:
            return write_rows<Slot, bf16_t>(a);
        default:
            return write_rows<Slot, f16_t>(a);
    }
}

}  // namespace

void enqueue(const Enqueue& a) {
    if (a.slots < 1 || a.features < 1 || a.n < 0 || a.n > a.slots)
        throw std::invalid_argument("enqueue: " + std::to_string(a.n) + " keys of " +
                                    std::to_string(a.features) + " features do not fit a queue of " +
                                    std::to_string(a.slots));
    if (*a.ptr < 0 || *a.ptr >= a.slots)
        throw std::invalid_argument("enqueue: ptr is " + std::to_string(*a.ptr) + ", expected 0 <= ptr < " +
                                    std::to_string(a.slots));
    switch (a.queue_dtype) {
        case DType::f32:
            write_keys<float>(a);
            break;
        case DType::bf16:
            write_keys<bf16_t>(a);
            break;
        default:
            write_keys<f16_t>(a);
    }
    *a.ptr = (*a.ptr + a.n) % a.slots;
}

}  // namespace moco_fast
