// What the losses' inner loops share, compiled once per instruction set: products of rows with a panel of
// queries, and the softmax of a tile of them.
//
// Queries travel in panels: `kPanel` queries side by side, feature by feature, so that element c of query w
// of a panel lies at [c * kPanel + w]. A vector register then always holds queries, never features: no
// horizontal sums, no masks, and tails of N are zero queries whose results nobody reads. Flash attention with
// V = K: a tile of rows meets a panel, the scores stay in L1, and the same tile is used again for the
// weighted sum while it is still near. Both products are one register kernel:
//   scores[j][w]   = sum_c row[j][c] * query[c][w]      (broadcast along c, R rows j at a time)
//   weighted[c][w] = sum_j row[j][c] * p[j][w]          (broadcast along j, R features c at a time)
// so rows are read as they lie in memory, and neither operand is ever packed.
#pragma once

#include "simd.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
// Rows per softmax step: 96 x 128 fp32 (48 KB) stream from L2; shorter tiles spend more on
// loading and storing the weighted sums, longer ones evict the panel.
constexpr int64_t kTile = 96;
// Longest chain of additions in a dot product. The cosine of a good positive is a sum of C terms of one sign,
// and its rounding is divided by T: one chain over C = 512 would lose four times what a blocked sum loses.
constexpr int64_t kDepth = 64;

// acc[r] += sum_d a[r * row_stride + d * depth_stride] * b[d], R rows against one panel.
template <int R>
MOCO_FAST_INLINE void product(const float* a, int64_t row_stride, int64_t depth_stride, const float* b,
                              int64_t depth, Vec (&acc)[R][2]) {
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
            Vec acc[R][2] = {};
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

// Score of every query of a panel with its own row, with the rounding of `Scores`: a row equal to it ties.
[[maybe_unused]] void paired_scores(const float* queries, const float* rows, int64_t features,
                                    float* scores) {
    for (int v = 0; v < 2; ++v) {
        Vec total{};
        for (int64_t first = 0; first < features; first += kDepth) {
            Vec acc{};
            for (int64_t c = first; c < features && c < first + kDepth; ++c)
                acc += load(rows + c * kPanel + v * kLanes) * load(queries + c * kPanel + v * kLanes);
            total = total + acc;
        }
        store(scores + v * kLanes, total);
    }
}

struct Weighted {
    const float *rows, *weights;
    int64_t count, features;
    float* sums;
    Vec scale0, scale1;

    // The tile is summed from zero and then added: shorter chains of additions, so less rounding.
    template <int R>
    MOCO_FAST_INLINE void run(const Weighted& t, int64_t c) {
        Vec acc[R][2] = {};
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

// Rows [first, first + count) of (any, C) in fp32: as they lie, or widened into `scratch`.
MOCO_FAST_INLINE const float* tile_rows(const void* rows, DType dtype, int64_t first, int64_t count,
                                        int64_t features, float* scratch) {
    const int64_t at = first * features, size = count * features;
    if (dtype == DType::f32) return static_cast<const float*>(rows) + at;
    if (dtype == DType::bf16)
        widen(static_cast<const bf16_t*>(rows) + at, scratch, size);
    else
        widen(static_cast<const f16_t*>(rows) + at, scratch, size);
    return scratch;
}

// Turns the scores of one panel into exp((s - max)/T), adds them to the sums and returns the factors for
// older sums. `see(v, s)` is called with every vector of scores of half v of the panel before that.
template <class See>
MOCO_FAST_INLINE void softmax_tile(float* scores, int64_t count, float scale_to_log2, float* max_so_far,
                                   float* sum_so_far, Vec (&scale)[2], const See& see) {
    Vec old_max[2], top[2], sum[2] = {};
    for (int v = 0; v < 2; ++v) old_max[v] = top[v] = load(max_so_far + v * kLanes);
    for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < 2; ++v) {
            const Vec s = load(scores + j * kPanel + v * kLanes);
            top[v] = max(s, top[v]);
            see(v, s);
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
        store(max_so_far + v * kLanes, top[v]);
        store(sum_so_far + v * kLanes, load(sum_so_far + v * kLanes) * scale[v] + sum[v]);
    }
}

}  // namespace
}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
