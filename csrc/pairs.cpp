// The two passes of pairs.h around their inner loops: cutting the work, packing, loss and gradient.
#include "pairs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu_features.h"
#include "pairs_isa.h"
#include "softmax_loss.h"

namespace moco_fast {
namespace {

// A block of rows of one problem and what a thread keeps of it.
struct Block {
    int64_t problem, first, count;  // rows [first, first + count) of the problem
    float* positive;                // (count), scratch
    PairsSweep sweep;
};

// Below this many multiplications one thread is done before the others wake.
constexpr int64_t kParallelProducts = 1 << 18;

// Calls `work(block)` for all blocks, packed and with a zeroed sum where `weighted` is wanted.
template <class Work>
void for_each_block(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                    bool weighted, int threads, const Work& work) {
    if (!(temperature > 0 && std::isfinite(temperature)))
        throw std::invalid_argument("temperature must be positive and finite");
    const PairsIsa& isa = MOCO_FAST_SELECTED(kPairs);
    // Rows and weighted sums of a block stay in L2 beside a tile of columns; blocks enough to balance any
    // usual number of cores.
    constexpr int64_t kBlockFloats = 32768, kBlockRows = 256, kBlocks = 32;
    const int64_t features = x.features, panels = (x.count + isa.panel - 1) / isa.panel;
    const int64_t fit = std::min(kBlockFloats / features, kBlockRows) / isa.panel;
    const int64_t block_panels =
        std::clamp<int64_t>(x.problems * panels / kBlocks, 1, std::max<int64_t>(fit, 1));
    const int64_t blocks = (panels + block_panels - 1) / block_panels, rows = block_panels * isa.panel;
    threads = x.problems * x.count * y.count * features < kParallelProducts ? 1 : std::max(1, threads);
    const int64_t tile = isa.tile * isa.panel;
    const auto packed = make_scratch<float>(threads * rows * features);
    const auto sums = make_scratch<float>(weighted ? threads * rows * features : 0);
    const auto states = make_scratch<float>(threads * 3 * rows);
    const auto scores = make_scratch<float>(threads * tile);
    const auto columns = make_scratch<int32_t>(threads * 2 * rows);

#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = thread_index();
        float *into = packed.get() + thread * rows * features, *state = states.get() + thread * 3 * rows;
        float* sum = weighted ? sums.get() + thread * rows * features : nullptr;
        int32_t* left_out = columns.get() + thread * 2 * rows;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < x.problems * blocks; ++item) {
            Block block;
            block.problem = item / blocks;
            block.first = item % blocks * rows;
            block.count = std::min(rows, x.count - block.first);
            block.positive = state + 2 * rows;
            const int64_t used = (block.count + isa.panel - 1) / isa.panel, lanes = used * isa.panel;
            block.sweep = {into,
                           used,
                           y.rows.get() + block.problem * y.count * features,
                           y.count,
                           features,
                           float(kLog2E / temperature),
                           left_out,
                           state,
                           state + rows,
                           nullptr,
                           nullptr,
                           sum,
                           scores.get() + thread * tile};
            const float* from = x.rows.get() + (block.problem * x.count + block.first) * features;
            to_panels(from, block.count, features, isa.panel, into);
            std::fill_n(left_out, 2 * lanes, -1);
            for (int64_t i = 0; i < block.count; ++i) {
                left_out[i] = int32_t(pairing.positive(block.first + i, y.count));
                if (pairing.paired) left_out[lanes + i] = int32_t(block.first + i);
            }
            if (sum) std::fill_n(sum, lanes * features, 0.0f);
            std::fill_n(state, 2 * rows, 0.0f);
            work(isa, block);
        }
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
    const double of_sum = scale / temperature, of_other = other ? miss / temperature : 0.0;
    if (!other) other = own;  // of which there is nothing
    const auto d_hat = [&](int64_t c) {
        return double(sum[c * panel]) * of_sum - of_other * double(other[c]);
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
            for (int64_t i = 0; i < block.count; ++i) {
                const float *a = x.rows.get() + (first + i) * features, *b = positive(i);
                s.max[i] = block.positive[i] =
                    float(sum_of(features, [&](int64_t c) { return double(a[c]) * double(b[c]); }));
            }
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
        PairsSweep& s = block.sweep;
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
