// The inner loops of pairs.h, compiled once per instruction set: every tile of columns meets every panel of
// rows.
#include "pairs_isa.h"
#include "products.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

// Overwrites the scores of columns [first, first + count) that rows of a panel do not meet.
void leave_out(float* scores, int64_t first, int64_t count, const int32_t* columns, float value) {
    for (int w = 0; w < kPanel; ++w) {
        const int64_t j = columns[w] - first;
        if (j >= 0 && j < count) scores[j * kPanel + w] = value;
    }
}

// `weigh(first, count, at, scale)` turns the scores of the panel that begins at row `at` with columns [first,
// first + count) into weights, and sets the factors for older sums.
template <class Weigh>
MOCO_FAST_INLINE void sweep(const PairsSweep& a, const Weigh& weigh) {
    for (int64_t first = 0; first < a.columns; first += kTile) {
        const int64_t count = a.columns - first < kTile ? a.columns - first : kTile;
        const float* rows = a.y + first * a.features;
        for (int64_t p = 0; p < a.panels; ++p) {
            const int64_t at = p * kPanel;
            run_grouped(count, Scores{rows, a.x + at * a.features, a.features, a.scores});
            Vec scale[2];
            weigh(first, count, at, scale);
            if (a.weighted)
                run_grouped(a.features, Weighted{rows, a.scores, count, a.features,
                                                 a.weighted + at * a.features, scale[0], scale[1]});
        }
    }
}

void first_pass(const PairsSweep& a) {
    sweep(a, [&](int64_t first, int64_t count, int64_t at, Vec(&scale)[2]) {
        for (int which = 0; which < 2; ++which)
            leave_out(a.scores, first, count, a.left_out + which * a.panels * kPanel + at, -__builtin_inff());
        softmax_tile(a.scores, count, a.scale_to_log2, a.max + at, a.sum + at, scale, [](int, Vec) {});
    });
}

void second_pass(const PairsSweep& a) {
    sweep(a, [&](int64_t first, int64_t count, int64_t at, Vec(&scale)[2]) {
        scale[0] = scale[1] = splat(1.0f);
        for (int v = 0; v < 2; ++v) {
            const Vec own_max = a.max ? load(a.max + at + v * kLanes) : Vec{};
            const Vec own_share = a.max ? load(a.sum + at + v * kLanes) : Vec{};
            for (int64_t j = 0; j < count; ++j) {
                float* score = a.scores + j * kPanel + v * kLanes;
                const Vec s = load(score);
                Vec weight =
                    exp2_scaled(s - splat(a.y_max[first + j]), a.scale_to_log2) * splat(a.y_share[first + j]);
                if (a.max) weight += exp2_scaled(s - own_max, a.scale_to_log2) * own_share;
                store(score, weight);
            }
        }
        for (int which = 0; which < 2; ++which)
            leave_out(a.scores, first, count, a.left_out + which * a.panels * kPanel + at, 0.0f);
    });
}

}  // namespace

const PairsIsa kPairs = {kPanel, kTile, paired_scores, first_pass, second_pass};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
