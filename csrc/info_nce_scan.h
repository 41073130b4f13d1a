// What the scans of info_nce share beside their products: the softmax of a tile, and the next one prefetched.
#pragma once

#include "info_nce_isa.h"
#include "products.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

// Turns the scores of one panel into exp((s - max)/T) and returns the factors for older sums.
void softmax_panel(float* scores, int64_t count, const float* positive, float scale_to_log2,
                   SoftmaxState state, Vec (&scale)[2]) {
    const Vec pos[2] = {load(positive), load(positive + kLanes)};
    Vec cosines[2] = {};
    Int above[2] = {};
    softmax_tile(scores, count, scale_to_log2, state.max, state.sum, scale, [&](int v, Vec s) {
        above[v] -= s > pos[v];
        cosines[v] += s;
    });
    for (int v = 0; v < 2; ++v) {
        store(state.cosine_sum + v * kLanes, load(state.cosine_sum + v * kLanes) + cosines[v]);
        for (int i = 0; i < kLanes; ++i) state.rank[v * kLanes + i] += above[v][i];
    }
}

// Asks for a part, one of as many as there are panels, of the tile of queue rows that comes next, while this
// one is computed: the queue is far larger than the caches, and who reads a tile first would wait for memory.
MOCO_FAST_INLINE void prefetch_part(const InfoNceScan& a, int64_t first, int64_t tile, int64_t panel) {
    constexpr int64_t kLine = 64;  // bytes of a cache line
    if (first >= a.count) return;
    const int64_t count = a.count - first < tile ? a.count - first : tile;
    const int64_t width = bytes_of(a.rows_dtype), bytes = count * a.features * width;
    const char* rows = static_cast<const char*>(a.rows) + first * a.features * width;
    for (int64_t at = bytes * panel / a.panels; at < bytes * (panel + 1) / a.panels; at += kLine)
        __builtin_prefetch(rows + at, 0, 2);
}

// The state of the panel that starts at query `at`.
MOCO_FAST_INLINE SoftmaxState from_query(SoftmaxState state, int64_t at) {
    return {state.max + at, state.sum + at, state.cosine_sum + at, state.rank + at};
}

}  // namespace
}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
