// The inner loops of info_nce (specification in info_nce.h), compiled once per instruction set: every tile of
// the queue meets every panel of queries (products.h), and the next tile is asked for meanwhile.
#include "info_nce_scan.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

// Scores of a panel with a tile, and the tile in fp32 where it is not.
int64_t scratch(int64_t features, int64_t, DType rows_dtype) {
    return kTile * (kPanel + (rows_dtype == DType::f32 ? 0 : features));
}

void scan(const InfoNceScan& a) {
    const int64_t panel_size = a.features * kPanel;
    float *const scores = a.scratch, *const widened = scores + kTile * kPanel;
    for (int64_t first = 0; first < a.count; first += kTile) {
        const int64_t count = a.count - first < kTile ? a.count - first : kTile;
        const float* rows = tile_rows(a.rows, a.rows_dtype, first, count, a.features, widened);
        for (int64_t p = 0; p < a.panels; ++p) {
            const int64_t at = p * kPanel;
            prefetch_part(a, first + kTile, kTile, p);
            run_grouped(count, Scores{rows, a.queries + p * panel_size, a.features, scores});
            Vec scale[2];
            softmax_panel(scores, count, a.positive + at, a.scale_to_log2, from_query(a.state, at), scale);
            if (a.weighted)
                run_grouped(a.features, Weighted{rows, scores, count, a.features, a.weighted + p * panel_size,
                                                 scale[0], scale[1]});
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

}  // namespace

const InfoNceIsa kInfoNce = {kPanel, paired_scores, merge, {kTile, scratch, scan}};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
