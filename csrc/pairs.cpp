// The two passes of pairs.h around their inner loops: cutting the work, packing, loss and gradient.
#include "pairs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu_features.h"
#include "pairs_isa.h"
#include "parallel.h"
#include "softmax_loss.h"

namespace moco_fast {
namespace {

// A block of rows of one problem and what a thread keeps of it.
struct Block {
    int64_t problem, first, count;  // rows [first, first + count) of the problem
    float* positive;                // (panels, panel) scratch
    float* positives;               // (C, panel) scratch
    PairsSweep sweep;
};

// Calls `work(block)` for all blocks, packed and with a zeroed sum where `weighted` is wanted.
template <class Work>
void for_each_block(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                    bool weighted, int threads, const Work& work) {
    if (!(temperature > 0 && std::isfinite(temperature)))
        throw std::invalid_argument("temperature must be positive and finite");
    const PairsIsa& isa = MOCO_FAST_SELECTED(kPairs);
    // Rows and weighted sums of a block stay in L2 beside a tile of columns. A panel is the least that a
    // thread can have: where there are many, blocks of several of them meet a tile while it is near.
    constexpr int64_t kBlockFloats = 32768, kBlockRows = 256, kBlocks = 32;
    const int64_t features = x.features, panels = ceil_div(x.count, isa.panel);
    const int64_t fit = std::min(kBlockFloats / features, kBlockRows) / isa.panel;
    const int64_t block_panels =
        std::clamp<int64_t>(x.problems * panels / kBlocks, 1, std::max<int64_t>(fit, 1));
    const int64_t blocks = ceil_div(panels, block_panels), rows = block_panels * isa.panel;
    threads = x.problems * x.count * y.count * features < kParallelProducts ? 1 : std::max(1, threads);
    const int64_t tile = isa.tile * isa.panel, panel_size = isa.panel * features;
    const auto packed = make_scratch<float>(threads * (rows * features + panel_size));
    const auto sums = make_scratch<float>(weighted ? threads * rows * features : 0);
    const auto states = make_scratch<float>(threads * (3 * rows + tile));
    const auto columns = make_scratch<int32_t>(threads * 2 * rows);

#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = thread_index();
        Block block = {};
        PairsSweep& s = block.sweep;
        float* const panels_of_x = packed.get() + thread * (rows * features + panel_size);
        int32_t* const left_out = columns.get() + thread * 2 * rows;
        block.positives = panels_of_x + rows * features;
        s.x = panels_of_x;
        s.columns = y.count;
        s.features = features;
        s.scale_to_log2 = float(kLog2E / temperature);
        s.left_out = left_out;
        s.weighted = weighted ? sums.get() + thread * rows * features : nullptr;
        s.max = states.get() + thread * (3 * rows + tile);
        s.sum = s.max + rows;
        block.positive = s.sum + rows;
        s.scores = block.positive + rows;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < x.problems * blocks; ++item) {
            block.problem = item / blocks;
            block.first = item % blocks * rows;
            block.count = std::min(rows, x.count - block.first);
            s.panels = ceil_div(block.count, isa.panel);
            s.y = y.rows.get() + block.problem * y.count * features;
            const float* from = x.rows.get() + (block.problem * x.count + block.first) * features;
            to_panels(from, block.count, features, isa.panel, panels_of_x);
            const int64_t lanes = s.panels * isa.panel;
            std::fill_n(left_out, 2 * lanes, -1);
            for (int64_t i = 0; i < block.count; ++i) {
                left_out[i] = int32_t(pairing.positive(block.first + i, y.count));
                if (pairing.paired) left_out[lanes + i] = int32_t(block.first + i);
            }
            if (weighted) std::fill_n(s.weighted, lanes * features, 0.0f);
            std::fill_n(s.max, 2 * rows, 0.0f);
            work(isa, block);
        }
    }
}

// Cosines of the rows of a block and their positives.
void find_positives(const PairsIsa& isa, const Block& block) {
    const PairsSweep& s = block.sweep;
    for (int64_t at = 0; at < s.panels * isa.panel; at += isa.panel) {
        for (int64_t w = 0; w < isa.panel; ++w) {
            const float* row = at + w < block.count ? s.y + s.left_out[at + w] * s.features : nullptr;
            for (int64_t c = 0; c < s.features; ++c) block.positives[c * isa.panel + w] = row ? row[c] : 0.0f;
        }
        isa.positive(s.x + at * s.features, block.positives, s.features, block.positive + at);
    }
}

// The gradient to row i of a block, whose weights times `scale` are probabilities, less `miss` of its
// positive `other`.
void gradient(const PairsIsa& isa, const Block& block, int64_t i, double scale, double miss,
              const float* other, const UnitRows& x, double temperature, float* dx) {
    const int64_t features = x.features, row = block.problem * x.count + block.first + i;
    const float *sum = block.sweep.weighted + lane(i, features, isa.panel),
                *own = x.rows.get() + row * features;
    const int64_t panel = isa.panel;
    const double of_sum = scale / temperature, of_other = miss / temperature;
    const auto d_hat = [&](int64_t c) {
        return double(sum[c * panel]) * of_sum - (other ? of_other * double(other[c]) : 0.0);
    };
    through_norm(features, x.norms[row], d_hat, [&](int64_t c) { return own[c]; }, dx + row * features);
}

}  // namespace

Softmaxes::Softmaxes(const UnitRows& x)
    : max(make_scratch<float>(x.problems * x.count)),
      share(make_scratch<float>(x.problems * x.count)),
      miss(make_scratch<float>(x.problems * x.count)) {}

int64_t Pairing::positive(int64_t row, int64_t columns) const {
    const int64_t column = row + shift;
    if (paired) return column % columns;
    return column >= 0 && column < columns ? column : -1;
}

void first_pass(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                Softmaxes& of_x, float* loss, float* dx, int threads) {
    for_each_block(
        x, y, pairing, temperature, dx != nullptr, threads, [&](const PairsIsa& isa, const Block& block) {
            const PairsSweep& s = block.sweep;
            const int64_t features = x.features, first = block.problem * x.count + block.first;
            const auto positive = [&](int64_t i) { return s.y + s.left_out[i] * features; };
            find_positives(isa, block);
            std::copy_n(block.positive, s.panels * isa.panel, s.max);
            isa.first_pass(s);
            for (int64_t i = 0; i < block.count; ++i) {
                const CrossEntropy found = cross_entropy(s.max[i], s.sum[i], block.positive[i], temperature);
                loss[first + i] = float(found.loss);
                of_x.max[first + i] = s.max[i];
                of_x.share[first + i] = float(1.0 / found.total);
                of_x.miss[first + i] = float(double(s.sum[i]) / found.total);
                if (dx)
                    gradient(isa, block, i, 1.0 / found.total, double(s.sum[i]) / found.total, positive(i), x,
                             temperature, dx);
            }
        });
}

void second_pass(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                 const Softmaxes& of_y, float* dx, int threads) {
    for_each_block(x, y, pairing, temperature, true, threads, [&](const PairsIsa& isa, Block block) {
        PairsSweep& s = block.sweep;  // of a copy: the next block finds its own
        const int64_t columns = block.problem * y.count, first = columns + block.first;
        s.y_max = of_y.max.get() + columns;
        s.y_share = of_y.share.get() + columns;
        if (pairing.paired) {
            std::copy_n(of_y.max.get() + first, block.count, s.max);
            std::copy_n(of_y.share.get() + first, block.count, s.sum);
        } else {
            s.max = s.sum = nullptr;
        }
        isa.second_pass(s);
        for (int64_t i = 0; i < block.count; ++i) {
            const int64_t other = s.left_out[i];
            double miss = other < 0 ? 0.0 : of_y.miss[columns + other];
            if (pairing.paired) miss += of_y.miss[first + i];
            gradient(isa, block, i, 1.0, miss, other < 0 ? nullptr : s.y + other * x.features, x, temperature,
                     dx);
        }
    });
}

}  // namespace moco_fast
