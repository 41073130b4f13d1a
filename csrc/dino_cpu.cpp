// The inner loops of dino.h, compiled once per instruction set: every tile of prototypes meets every panel of
// rows.
#include "dino_isa.h"
#include "products.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr int64_t kGroup = 4;  // 4 panels of weights stay in L1 while their products with the rows are summed

// dw[j][c] = sum over the rows of a group of weight[j][row] * student[row][c], one panel of features c at a
// time.
struct Outer {
    const float* weights;  // (groups, tile, panel)
    int64_t rows;          // of the group
    const float* columns;  // (groups, panel, panel): of the rows of the group, the features of the panel
    float* out;            // (tile, width), of which this panel
    int64_t width;
    bool add;

    template <int R>
    MOCO_FAST_INLINE void run(const Outer& t, int64_t j) {
        Vec acc[R][2] = {};
        for (int64_t row = 0; row < t.rows; row += kPanel)
            product<R>(t.weights + row * kTile + j * kPanel, kPanel, 1, t.columns + row * kPanel,
                       t.rows - row < kPanel ? t.rows - row : kPanel, acc);
        float* out = t.out + j * t.width;
        for (int r = 0; r < R; ++r, out += t.width) {
            store(out, t.add ? load(out) + acc[r][0] : acc[r][0]);
            store(out + kLanes, t.add ? load(out + kLanes) + acc[r][1] : acc[r][1]);
        }
    }
};

// A tile of a run, with its rows in fp32.
struct Tile {
    int64_t first, count;
    const float *student, *teacher, *center;
};

Tile tile_at(const DinoScan& a, int64_t first) {
    const int64_t count = a.count - first < kTile ? a.count - first : kTile;
    return {
        first, count,
        tile_rows(a.prototypes, a.prototypes_dtype, first, count, a.features, a.prototypes_tile),
        tile_rows(a.teacher_prototypes, a.teacher_prototypes_dtype, first, count, a.features, a.teacher_tile),
        a.center + first};
}

// Dot products of a tile with the panel of rows that begins at `at`, the teacher's less their center.
MOCO_FAST_INLINE void score(const DinoScan& a, const Tile& tile, int64_t at, float* student, float* teacher) {
    run_grouped(tile.count, Scores{tile.student, a.student + at * a.features, a.features, student});
    run_grouped(tile.count, Scores{tile.teacher, a.teacher + at * a.features, a.features, teacher});
    for (int64_t j = 0; j < tile.count; ++j)
        for (int v = 0; v < 2; ++v) {
            float* to = teacher + j * kPanel + v * kLanes;
            store(to, load(to) - splat(tile.center[j]));
        }
}

void first_sweep(const DinoScan& a) {
    for (int64_t first = 0; first < a.count; first += kTile) {
        const Tile tile = tile_at(a, first);
        for (int64_t at = 0; at < a.panels * kPanel; at += kPanel) {
            float *student = a.student_scores, *teacher = a.teacher_scores;
            score(a, tile, at, student, teacher);
            Vec scale[2], cross[2] = {}, shift[2];
            for (int v = 0; v < 2; ++v) {
                // The scores of a row may have much in common, which must not cost the loss its digits.
                if (first == 0) store(a.shift + at + v * kLanes, load(student + v * kLanes));
                shift[v] = load(a.shift + at + v * kLanes);
            }
            softmax_tile(teacher, tile.count, a.teacher_scale, a.teacher_max + at, a.teacher_sum + at, scale,
                         [](int, Vec) {});
            for (int64_t j = 0; j < tile.count; ++j)
                for (int v = 0; v < 2; ++v) {
                    const int64_t to = j * kPanel + v * kLanes;
                    cross[v] += load(teacher + to) * (load(student + to) - shift[v]);
                }
            for (int v = 0; v < 2; ++v) {
                float* to = a.cross + at + v * kLanes;
                store(to, load(to) * scale[v] + cross[v]);
            }
            softmax_tile(student, tile.count, a.student_scale, a.student_max + at, a.student_sum + at, scale,
                         [](int, Vec) {});
        }
    }
}

// (p^s - p^t) / T_s of a tile and a panel, in place of the student's scores.
MOCO_FAST_INLINE void weigh(const DinoScan& a, int64_t count, int64_t at, float* student,
                            const float* teacher) {
    for (int v = 0; v < 2; ++v) {
        const int64_t lane = at + v * kLanes;
        const Vec student_max = load(a.student_max + lane), student_share = load(a.student_sum + lane);
        const Vec teacher_max = load(a.teacher_max + lane), teacher_share = load(a.teacher_sum + lane);
        for (int64_t j = 0; j < count; ++j) {
            const int64_t to = j * kPanel + v * kLanes;
            const Vec p = exp2_scaled(load(student + to) - student_max, a.student_scale) * student_share;
            const Vec wanted = exp2_scaled(load(teacher + to) - teacher_max, a.teacher_scale) * teacher_share;
            store(student + to, p - wanted);
        }
    }
}

void second_sweep(const DinoScan& a) {
    const int64_t padded = a.panels * kPanel, width = (a.features + kPanel - 1) / kPanel * kPanel;
    for (int64_t first = 0; first < a.count; first += kTile) {
        const Tile tile = tile_at(a, first);
        for (int64_t group = 0; group < a.panels; group += kGroup) {
            const int64_t groups = a.panels - group < kGroup ? a.panels - group : kGroup;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t at = (group + g) * kPanel;
                float* weights = a.student_scores + g * kTile * kPanel;
                score(a, tile, at, weights, a.teacher_scores);
                weigh(a, tile.count, at, weights, a.teacher_scores);
                if (a.ds)
                    run_grouped(a.features, Weighted{tile.student, weights, tile.count, a.features,
                                                     a.ds + at * a.features, splat(1.0f), splat(1.0f)});
            }
            const int64_t done = group * kPanel, left = a.rows - done;
            for (int64_t c = 0; a.dw && c < width; c += kPanel)
                run_grouped(
                    tile.count,
                    Outer{a.student_scores, left < groups * kPanel ? left : groups * kPanel,
                          a.student_columns + c * padded + done * kPanel, a.dw_tile + c, width, group > 0});
        }
        for (int64_t j = 0; a.dw && j < tile.count; ++j)
            for (int64_t c = 0; c < a.features; ++c)
                a.dw[(first + j) * a.features + c] = a.dw_tile[j * width + c];
    }
}

}  // namespace

const DinoIsa kDino = {kPanel, kTile, kGroup, first_sweep, second_sweep};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
