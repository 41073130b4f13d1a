// info_nce around its inner loops: cutting the work, packing, adding the parts in order, loss and gradient.
#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu_features.h"
#include "info_nce_isa.h"
#include "memory.h"
#include "parallel.h"
#include "softmax_loss.h"
#include "unit_rows.h"

namespace moco_fast {
namespace {

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// How the work is cut; a function of the shapes and the instruction set, never of the number of threads.
struct Plan {
    int64_t panels, block_panels, blocks, tiles, split_tiles, splits;

    Plan(const InfoNce& a, int64_t panel, int64_t tile) {
        // Queries and weighted sums of a block stay in L2 beside a tile of rows.
        constexpr int64_t kBlockFloats = 32768, kBlockQueries = 256;
        // Enough items to balance any usual number of cores; with 128 KB of sums each that is 4 MB.
        constexpr int64_t kItems = 32, kLeastTiles = 8;
        panels = ceil_div(a.n, panel);
        const int64_t fit = std::min(kBlockFloats / a.features, kBlockQueries) / panel;
        block_panels = std::min(panels, std::max<int64_t>(fit, 1));
        blocks = ceil_div(panels, block_panels);
        tiles = ceil_div(a.negatives, tile);
        const int64_t wanted = std::min(ceil_div(kItems, blocks), ceil_div(tiles, kLeastTiles));
        split_tiles = ceil_div(tiles, wanted);
        splits = ceil_div(tiles, split_tiles);
    }
};

const InfoNceScanner& scanner_of([[maybe_unused]] const InfoNce& a, const InfoNceIsa& isa) {
#if defined(MOCO_FAST_AMX)
    if (a.bf16 && has_amx()) return amx::kInfoNceBf16;
#endif
    return isa.fp32;
}

// Loss and gradient of one query from its finished softmax; element c of a vector lies at [c * stride].
struct Query {
    float max, sum, cosine_sum, pos, norm;
    const float *weighted, *q_hat, *k_hat;
    int64_t stride;
};

void finish(const Query& x, int64_t negatives, int64_t features, double temperature, float* loss, float* dq,
            float* neg) {
    const CrossEntropy found = cross_entropy(x.max, x.sum, x.pos, temperature);
    // A cosine of -inf has vanished from the sum: its trace in the mean makes the loss NaN.
    *loss = float(found.loss + 0.0 * double(x.cosine_sum));
    *neg = float(double(x.cosine_sum) / double(negatives));
    if (!dq) return;
    const double scale = 1.0 / (found.total * temperature);
    const auto d_hat = [&](int64_t c) {
        return (double(x.weighted[c * x.stride]) - double(x.sum) * double(x.k_hat[c * x.stride])) * scale;
    };
    through_norm(features, x.norm, d_hat, [&](int64_t c) { return x.q_hat[c * x.stride]; }, dq);
}

// Adds the splits of one panel into the first, in order.
void merge_splits(const InfoNceIsa& isa, int64_t splits, int64_t padded, int64_t features, double temperature,
                  SoftmaxState s, float* weighted) {
    float into_scale[64], from_scale[64];
    for (int64_t split = 1; split < splits; ++split) {
        const int64_t offset = split * padded;
        for (int64_t w = 0; w < isa.panel; ++w) {
            const float a = s.max[w], b = s.max[offset + w], top = b > a ? b : a;
            into_scale[w] = float(std::exp((double(a) - double(top)) / temperature));
            from_scale[w] = float(std::exp((double(b) - double(top)) / temperature));
            s.max[w] = top;
            s.sum[w] = s.sum[w] * into_scale[w] + s.sum[offset + w] * from_scale[w];
            s.cosine_sum[w] += s.cosine_sum[offset + w];
            s.rank[w] += s.rank[offset + w];
        }
        if (weighted) isa.merge(weighted, weighted + offset * features, into_scale, from_scale, features);
    }
}

}  // namespace

void info_nce(const InfoNce& a) {
    require(a.n > 0 && a.negatives > 0 && a.features > 0, "info_nce: N, K and C must be at least 1");
    require(a.temperature > 0 && std::isfinite(a.temperature),
            "info_nce: temperature must be positive and finite");
    const InfoNceIsa& isa = MOCO_FAST_SELECTED(kInfoNce);
    const InfoNceScanner& scanner = scanner_of(a, isa);
    const Plan plan(a, isa.panel, scanner.tile);
    const int threads = std::max(1, a.threads);
    const int64_t width = isa.panel, padded = plan.panels * width, panel_size = width * a.features;

    const UnitRows q_rows(a.q, a.qk_dtype, 1, a.n, a.features, threads);
    const UnitRows k_rows(a.k, a.qk_dtype, 1, a.n, a.features, threads);
    Scratch<float> q = make_scratch<float>(padded * a.features), k = make_scratch<float>(padded * a.features);
    Scratch<float> cosine = make_scratch<float>(padded);
    Scratch<float> state = make_scratch<float>(3 * plan.splits * padded);
    Scratch<int32_t> ranks = make_scratch<int32_t>(plan.splits * padded);
    Scratch<float> weighted = make_scratch<float>(a.dq ? plan.splits * padded * a.features : 0);
    const int64_t scratch_size =
        ceil_div(scanner.scratch(a.features, plan.block_panels, a.queue_dtype), 16) * 16;  // whole lines
    Scratch<float> scratch = make_scratch<float>(threads * scratch_size);
    const int64_t row_bytes = a.features * bytes_of(a.queue_dtype);

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < plan.panels; ++p) {
            const int64_t first = p * width, count = std::min(width, a.n - first);
            float *q_at = q.get() + p * panel_size, *k_at = k.get() + p * panel_size;
            to_panels(q_rows.rows.get() + first * a.features, count, a.features, width, q_at);
            to_panels(k_rows.rows.get() + first * a.features, count, a.features, width, k_at);
            isa.positive(q_at, k_at, a.features, cosine.get() + first);
        }

#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < plan.blocks * plan.splits; ++item) {
            const int64_t split = item / plan.blocks, panel = item % plan.blocks * plan.block_panels;
            const int64_t panels = std::min(plan.block_panels, plan.panels - panel);
            const int64_t row = split * plan.split_tiles * scanner.tile;
            const int64_t at = split * padded + panel * width, size = panels * width;
            InfoNceScan scan;
            scan.queries = q.get() + panel * panel_size;
            scan.positive = cosine.get() + panel * width;
            scan.panels = panels;
            scan.rows = static_cast<const char*>(a.queue) + row * row_bytes;
            scan.rows_dtype = a.queue_dtype;
            scan.count = std::min(plan.split_tiles * scanner.tile, a.negatives - row);
            scan.features = a.features;
            scan.scale_to_log2 = float(kLog2E / a.temperature);
            scan.state = {state.get() + at, state.get() + plan.splits * padded + at,
                          state.get() + 2 * plan.splits * padded + at, ranks.get() + at};
            scan.weighted = a.dq ? weighted.get() + at * a.features : nullptr;
            scan.scratch = scratch.get() + thread_index() * scratch_size;
            std::copy_n(scan.positive, size, scan.state.max);
            std::fill_n(scan.state.sum, size, 0.0f);
            std::fill_n(scan.state.cosine_sum, size, 0.0f);
            std::fill_n(scan.state.rank, size, 0);
            if (a.dq) std::fill_n(scan.weighted, size * a.features, 0.0f);
            scanner.scan(scan);
        }

#pragma omp for schedule(static)
        for (int64_t p = 0; p < plan.panels; ++p) {
            const int64_t first = p * width, count = std::min(width, a.n - first);
            const SoftmaxState s = {state.get() + first, state.get() + plan.splits * padded + first,
                                    state.get() + 2 * plan.splits * padded + first, ranks.get() + first};
            float* sums = a.dq ? weighted.get() + p * panel_size : nullptr;
            merge_splits(isa, plan.splits, padded, a.features, a.temperature, s, sums);
            for (int64_t w = 0; w < count; ++w) {
                const int64_t i = first + w, at = p * panel_size + w;
                const Query x = {s.max[w],     s.sum[w],        s.cosine_sum[w],
                                 cosine[i],    q_rows.norms[i], a.dq ? sums + w : nullptr,
                                 q.get() + at, k.get() + at,    width};
                finish(x, a.negatives, a.features, a.temperature, a.loss + i,
                       a.dq ? a.dq + i * a.features : nullptr, a.neg + i);
                a.rank[i] = s.rank[w];
                a.pos[i] = cosine[i];
            }
        }
    }
}

}  // namespace moco_fast
