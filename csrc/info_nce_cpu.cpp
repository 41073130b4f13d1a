// The inner loops of info_nce (specification in info_nce.h), compiled once per instruction set.
//
// Flash attention with V = K: a tile of queue rows meets a panel of queries, the scores stay in L1, and the
// same tile of rows is used again for the weighted sum while it is still near. Both products are one register
// kernel:
//   scores[j][w]   = sum_c row[j][c] * query[c][w]      (broadcast along c, R rows j at a time)
//   weighted[c][w] = sum_j row[j][c] * p[j][w]          (broadcast along j, R features c at a time)
// so the queue is read as it lies in memory, and neither operand is ever packed.
#include "info_nce_isa.h"
#include "simd.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
// Rows of the queue per softmax step: 96 x 128 fp32 (48 KB) stream from L2; shorter tiles spend more on
// loading and storing the weighted sums, longer ones evict the panel.
constexpr int64_t kTile = 96;
// Longest chain of additions in a dot product. The cosine of a good positive is a sum of C terms of one sign,
// and its rounding is divided by T: one chain over C = 512 would lose four times what a blocked sum loses.
constexpr int64_t kDepth = 64;
constexpr int64_t kLine = 64;  // bytes of a cache line

// acc[r] = sum_d a[r * row_stride + d * depth_stride] * b[d], R rows against one panel.
template <int R>
MOCO_FAST_INLINE void product(const float* a, int64_t row_stride, int64_t depth_stride, const float* b,
                              int64_t depth, Vec (&acc)[R][2]) {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec{};
    for (int64_t d = 0; d < depth; ++d) {
        const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = splat(a[r * row_stride]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
        a += depth_stride;
        b += kPanel;
    }
}

struct Scores {
    const float *rows, *queries;
    int64_t features;
    float* scores;

    template <int R>
    MOCO_FAST_INLINE void run(const Scores& t, int64_t j) {
        for (int64_t c = 0; c < t.features; c += kDepth) {
            Vec acc[R][2];
            const int64_t depth = t.features - c < kDepth ? t.features - c : kDepth;
            product<R>(t.rows + j * t.features + c, t.features, 1, t.queries + c * kPanel, depth, acc);
            float* out = t.scores + j * kPanel;
            for (int r = 0; r < R; ++r, out += kPanel) {
                store(out, c ? load(out) + acc[r][0] : acc[r][0]);
                store(out + kLanes, c ? load(out + kLanes) + acc[r][1] : acc[r][1]);
            }
        }
    }
};

struct Weighted {
    const float *rows, *weights;
    int64_t count, features;
    float* sums;
    Vec scale0, scale1;

    // The tile is summed from zero and then added: shorter chains of additions, so less rounding.
    template <int R>
    MOCO_FAST_INLINE void run(const Weighted& t, int64_t c) {
        Vec acc[R][2];
        product<R>(t.rows + c, 1, t.features, t.weights, t.count, acc);
        float* out = t.sums + c * kPanel;
        for (int r = 0; r < R; ++r, out += kPanel) {
            store(out, load(out) * t.scale0 + acc[r][0]);
            store(out + kLanes, load(out + kLanes) * t.scale1 + acc[r][1]);
        }
    }
};

template <int R, class Task>
MOCO_FAST_INLINE void run_exactly(int size, const Task& task, int64_t at) {
    if (size == R)
        Task::template run<R>(task, at);
    else if constexpr (R > 1)
        run_exactly<R - 1>(size, task, at);
}

// Cuts [0, count) into groups of nearly equal size: two groups of 5 keep more FMAs in flight than 6 and 4.
template <class Task>
MOCO_FAST_INLINE void run_grouped(int64_t count, const Task& task) {
    const int64_t groups = (count + kRegisterRows - 1) / kRegisterRows;
    const int64_t size = count / groups, longer = count % groups;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int rows = int(size + (g < longer));
        run_exactly<kRegisterRows>(rows, task, at);
        at += rows;
    }
}

// Turns the scores of one panel into exp((s - max)/T) and returns the factors for older sums.
void softmax_tile(float* scores, int64_t count, const float* positive, float scale_to_log2,
                  SoftmaxState state, Vec (&scale)[2]) {
    Vec old_max[2], top[2], pos[2], cosines[2] = {}, sum[2] = {};
    Int above[2] = {};
    for (int v = 0; v < 2; ++v) {
        old_max[v] = top[v] = load(state.max + v * kLanes);
        pos[v] = load(positive + v * kLanes);
    }
    for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < 2; ++v) {
            const Vec s = load(scores + j * kPanel + v * kLanes);
            top[v] = max(s, top[v]);
            above[v] -= s > pos[v];
            cosines[v] += s;
        }
    for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < 2; ++v) {
            float* at = scores + j * kPanel + v * kLanes;
            const Vec p = exp2_scaled(load(at) - top[v], scale_to_log2);
            store(at, p);
            sum[v] += p;
        }
    for (int v = 0; v < 2; ++v) {
        scale[v] = exp2_scaled(old_max[v] - top[v], scale_to_log2);
        store(state.max + v * kLanes, top[v]);
        store(state.sum + v * kLanes, load(state.sum + v * kLanes) * scale[v] + sum[v]);
        store(state.cosine_sum + v * kLanes, load(state.cosine_sum + v * kLanes) + cosines[v]);
        for (int i = 0; i < kLanes; ++i) state.rank[v * kLanes + i] += above[v][i];
    }
}

const float* tile_rows(const InfoNceScan& a, int64_t first, int64_t count) {
    const int64_t at = first * a.features, size = count * a.features;
    if (a.rows_dtype == DType::bf16) {
        widen(static_cast<const bf16_t*>(a.rows) + at, a.widened_rows, size);
        return a.widened_rows;
    }
    if (a.rows_dtype == DType::f16) {
        widen(static_cast<const f16_t*>(a.rows) + at, a.widened_rows, size);
        return a.widened_rows;
    }
    return static_cast<const float*>(a.rows) + at;
}

// Asks for part `index` of `parts` of the tile that comes next, while this one is computed: the queue is far
// larger than the caches, and the first panel of a tile would wait for memory.
MOCO_FAST_INLINE void prefetch_part(const InfoNceScan& a, int64_t first, int64_t index, int64_t parts) {
    if (first >= a.count) return;
    const int64_t count = a.count - first < kTile ? a.count - first : kTile;
    const int64_t width = a.rows_dtype == DType::f32 ? 4 : 2, bytes = count * a.features * width;
    const char* rows = static_cast<const char*>(a.rows) + first * a.features * width;
    for (int64_t at = bytes * index / parts; at < bytes * (index + 1) / parts; at += kLine)
        __builtin_prefetch(rows + at, 0, 2);
}

void scan(const InfoNceScan& a) {
    const int64_t panel_size = a.features * kPanel;
    for (int64_t first = 0; first < a.count; first += kTile) {
        const int64_t count = a.count - first < kTile ? a.count - first : kTile;
        const float* rows = tile_rows(a, first, count);
        for (int64_t p = 0; p < a.panels; ++p) {
            const int64_t at = p * kPanel;
            prefetch_part(a, first + kTile, p, a.panels);
            run_grouped(count, Scores{rows, a.queries + p * panel_size, a.features, a.scores});
            Vec scale[2];
            softmax_tile(a.scores, count, a.positive + at, a.scale_to_log2,
                         {a.state.max + at, a.state.sum + at, a.state.cosine_sum + at, a.state.rank + at},
                         scale);
            if (a.weighted)
                run_grouped(a.features, Weighted{rows, a.scores, count, a.features,
                                                 a.weighted + p * panel_size, scale[0], scale[1]});
        }
    }
}

void positive(const float* queries, const float* keys, int64_t features, float* cosine) {
    for (int v = 0; v < 2; ++v) {
        Vec total{};
        for (int64_t first = 0; first < features; first += kDepth) {
            Vec acc{};
            for (int64_t c = first; c < features && c < first + kDepth; ++c)
                acc += load(keys + c * kPanel + v * kLanes) * load(queries + c * kPanel + v * kLanes);
            total = total + acc;
        }
        store(cosine + v * kLanes, total);
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

const InfoNceIsa kInfoNce = {kPanel, kTile, positive, scan, merge, softmax_row};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
