// The inner loops of info_nce (specification in info_nce.h), compiled once per instruction set: every tile of
// the queue meets every panel of queries (products.h), and the next tile is asked for meanwhile.
#include "info_nce_isa.h"
#include "products.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

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

// Asks for part `index` of `parts` of the tile that comes next, while this one is computed: the queue is far
// larger than the caches, and the first panel of a tile would wait for memory.
MOCO_FAST_INLINE void prefetch_part(const InfoNceScan& a, int64_t first, int64_t index, int64_t parts) {
    if (first >= a.count) return;
    const int64_t count = a.count - first < kTile ? a.count - first : kTile;
    const int64_t width = bytes_of(a.rows_dtype), bytes = count * a.features * width;
    const char* rows = static_cast<const char*>(a.rows) + first * a.features * width;
    for (int64_t at = bytes * index / parts; at < bytes * (index + 1) / parts; at += kLine)
        __builtin_prefetch(rows + at, 0, 2);
}

void scan(const InfoNceScan& a) {
    const int64_t panel_size = a.features * kPanel;
    for (int64_t first = 0; first < a.count; first += kTile) {
        const int64_t count = a.count - first < kTile ? a.count - first : kTile;
        const float* rows = tile_rows(a.rows, a.rows_dtype, first, count, a.features, a.widened_rows);
        for (int64_t p = 0; p < a.panels; ++p) {
            const int64_t at = p * kPanel;
            prefetch_part(a, first + kTile, p, a.panels);
            run_grouped(count, Scores{rows, a.queries + p * panel_size, a.features, a.scores});
            Vec scale[2];
            softmax_panel(a.scores, count, a.positive + at, a.scale_to_log2,
                          {a.state.max + at, a.state.sum + at, a.state.cosine_sum + at, a.state.rank + at},
                          scale);
            if (a.weighted)
                run_grouped(a.features, Weighted{rows, a.scores, count, a.features,
                                                 a.weighted + p * panel_size, scale[0], scale[1]});
        }
    }
}

void merge(float* into, const float* from, const float* into_scale, const float* from_scale,
           int64_t features) {
    for (int v = 0; v < 2; ++v) {
        const Vec a = load(into_scale + v * kLanes), b = load(from_scale + v * kLanes);
        for (int64_t c = 0; c < features; ++c) {
            const int64_t at = c * kPanel + v * kLanes;
            store(into + at, load(into + at) * a + load(from + at) * b);
        }
    }
}

MOCO_FAST_INLINE float sum_lanes(Vec v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

float softmax_row(const InfoNceSoftmaxRow& a) {
    const int64_t whole = a.count - a.count % kLanes;
    // The last, partial vector is padded with the positive: never above the maximum, never ranked before it.
    float rest[kLanes];
    Int inside;
    for (int i = 0; i < kLanes; ++i) {
        inside[i] = whole + i < a.count ? -1 : 0;
        rest[i] = inside[i] ? a.cosines[whole + i] : a.positive;
    }
    const Vec pos = splat(a.positive), last = load(rest);
    Vec top = splat(*a.max), cosines = Vec(Int(last) & inside), sum{};
    top = max(last, top);
    Int above = -Int(last > pos);
    for (int64_t j = 0; j < whole; j += kLanes) {
        const Vec s = load(a.cosines + j);
        top = max(s, top);
        above -= s > pos;
        cosines += s;
    }
    float new_max = top[0];
    for (int i = 1; i < kLanes; ++i) new_max = top[i] > new_max ? top[i] : new_max;
    top = splat(new_max);
    for (int64_t j = 0; j < whole; j += kLanes) {
        const Vec p = exp2_scaled(load(a.cosines + j) - top, a.scale_to_log2);
        store(a.cosines + j, p);
        sum += p;
    }
    const Vec p = Vec(Int(exp2_scaled(last - top, a.scale_to_log2)) & inside);
    sum += p;
    for (int64_t j = whole; j < a.count; ++j) a.cosines[j] = p[j - whole];
    const float scale = exp2_scaled(splat(*a.max) - top, a.scale_to_log2)[0];
    *a.max = new_max;
    *a.sum = *a.sum * scale + sum_lanes(sum);
    *a.cosine_sum += sum_lanes(cosines);
    for (int i = 0; i < kLanes; ++i) *a.rank += above[i];
    return scale;
}

}  // namespace

const InfoNceIsa kInfoNce = {kPanel, kTile, paired_scores, scan, merge, softmax_row};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
